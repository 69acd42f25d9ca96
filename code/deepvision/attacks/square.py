"""Square attack (Andriushchenko et al., 2020): random search, no gradient. Torch alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepvision.attacks.norms import column, sample_like, size
from deepvision.attacks.pgd import Attack, attack_succeeded, select

# Halve the share of pixels at these iterations of 10,000 (section 3, "schedule")
HALVINGS = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Each step tries a square of one colour and keeps it where the loss rises (algorithm 1).

    steps: the queries after the first, whose start is vertical stripes.
    share: of an image's pixels that the first squares cover, p in the paper.

    Images alone, `(N, C, H, W)`. In l_2 and l_1 the same squares are scaled and projected, where
    the paper shapes and merges them: a weaker search.
    """

    steps: int = 200
    loss: str | Callable[[Tensor, Tensor, Tensor | None], Tensor] = "margin"
    early_stop: bool = True
    share: float = 0.05

    @torch.no_grad()
    def _run(self, net: Callable[[dict], Tensor], s: dict) -> Tensor:
        N, C, _, W = s["delta"].shape
        s["delta"] = self._moved(s, self._signs(s, (N, C, 1, W)).expand_as(s["delta"]))
        s["loss"] = torch.full_like(s["delta"][:, 0, 0, 0], -torch.inf)
        s["index"] = torch.arange(N, device=s["delta"].device)
        result = s["delta"].clone()
        for i in range(self.steps + 1):
            proposal = s | {"delta": self._moved(s, self._square(i, s))} if i else s
            logits = net(proposal)
            loss = self._loss(logits, s)
            better = loss > s["loss"]
            s["delta"] = torch.where(column(better, s["delta"]), proposal["delta"], s["delta"])
            s["loss"] = torch.where(better, loss, s["loss"])
            result[s["index"]] = s["delta"]
            if self.early_stop:
                s = select(s, ~(better & attack_succeeded(logits, s["y"], s["t"])))
                if len(s["index"]) == 0:
                    break
        return result

    def _moved(self, s: dict, signs: Tensor) -> Tensor:
        """delta pushed across the ball where signs are not 0; in l_inf, to its edge."""
        step = 2 * self.epsilon * signs / size(signs, self.norm).clamp(min=1e-12)
        return self._project(s, s["delta"] + step)

    def _square(self, i: int, s: dict) -> Tensor:
        """One square at a random place in each image, every channel up or down: (N, C, H, W)."""
        N, C, H, W = s["delta"].shape
        side = self.side(i, H, W)
        rows, columns = (self._window(s, N, n, side) for n in (H, W))  # (N, H), (N, W)
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return inside * self._signs(s, (N, C, 1, 1))

    def side(self, i: int, H: int, W: int) -> int:
        done = 10_000 * i / max(self.steps, 1)
        share = self.share / 2 ** sum(done > halving for halving in HALVINGS)
        return min(H, W, max(1, round((share * H * W) ** 0.5)))

    def _window(self, s: dict, N: int, length: int, side: int) -> Tensor:
        start = sample_like(torch.randint, (N, 1), s["y"], self.generator, length - side + 1)
        places = torch.arange(length, device=start.device)
        return (places >= start) & (places < start + side)

    def _signs(self, s: dict, shape: tuple[int, ...]) -> Tensor:
        return 2 * sample_like(torch.randint, shape, s["delta"], self.generator, 2) - 1
