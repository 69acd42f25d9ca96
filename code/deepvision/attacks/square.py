"""Square attack (Andriushchenko et al., 2020): random search without gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepvision.attacks.losses import Loss
from deepvision.attacks.norms import lp_norm, per_sample, sample_like
from deepvision.attacks.pgd import Attack, Network, State

# p is halved at these iterations, whatever the number of queries, as in AutoAttack
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Each iteration tries a square of one colour and keeps it where the loss rises (algorithm 1).

    steps: the queries after the first one, which is at vertical stripes.
    p: the fraction of an image's pixels that the first squares cover; 0.8 as in AutoAttack.

    For images (N, C, H, W). In l_2 and l_1 the same squares are scaled and projected; the paper
    shapes and merges them.
    """

    steps: int = 200
    loss: str | Loss = "margin"
    early_stop: bool = True
    p: float = 0.8

    @torch.no_grad()
    def _run(self, net: Network, s: State) -> Tensor:
        N, C, _, W = s.delta.shape
        s.delta = self._moved(s, self._signs(s, (N, C, 1, W)).expand_as(s.delta))
        s.f = torch.full_like(s.delta[:, 0, 0, 0], -torch.inf)
        s.index = torch.arange(N, device=s.delta.device)
        result = s.delta.clone()
        for i in range(self.steps + 1):
            proposal = replace(s, delta=self._moved(s, self._square(i, s))) if i else s
            logits = net(proposal)
            f = self._loss(logits, s)
            better = f > s.f
            s.delta = torch.where(per_sample(better, s.delta), proposal.delta, s.delta)
            s.f = torch.where(better, f, s.f)
            result[s.index] = s.delta
            if self.early_stop:
                s = s.select(~(better & self._succeeded(logits, s.y, s.t)))
                if len(s.index) == 0:
                    break
        return result

    def _moved(self, s: State, signs: Tensor) -> Tensor:
        """delta moved across the ball where signs are not 0; in l_inf to its surface."""
        step = 2 * self.epsilon * signs / lp_norm(signs, self.norm).clamp(min=1e-12)
        return self._project(s, s.delta + step)

    def _square(self, i: int, s: State) -> Tensor:
        """Signs (N, C, H, W) of one random square per image, 0 elsewhere."""
        N, C, H, W = s.delta.shape
        side = self.side(i, H, W)
        rows, columns = (self._window(s, N, n, side) for n in (H, W))  # (N, H), (N, W)
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return inside * self._signs(s, (N, C, 1, 1))

    def side(self, i: int, H: int, W: int) -> int:
        """The side of the squares at iteration i, in pixels of an image (H, W)."""
        p = self.p / 2 ** sum(i > halving for halving in HALVINGS)
        return min(H, W, max(1, round((p * H * W) ** 0.5)))

    def _window(self, s: State, N: int, length: int, side: int) -> Tensor:
        start = sample_like(torch.randint, (N, 1), s.y, self.generator, length - side + 1)
        positions = torch.arange(length, device=start.device)
        return (positions >= start) & (positions < start + side)

    def _signs(self, s: State, shape: tuple[int, ...]) -> Tensor:
        return 2 * sample_like(torch.randint, shape, s.delta, self.generator, 2) - 1
