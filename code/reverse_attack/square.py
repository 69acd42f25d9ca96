"""Square attack: l_inf, by queries alone (Andriushchenko et al., 2020, algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attacks import margin

FIRST_SHARE = 0.8  # of the pixels that the first squares cover
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # of it, as shares of the queries


@torch.no_grad()
def square_attack(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    epsilon: float,
    queries: int,
    generator: torch.Generator,
) -> Tensor:
    """Random squares of +-epsilon (pixels of [0, 1]), kept where they raise the margin.

    The model is called once for the start and once for each further query; an image that is
    misclassified is left alone from then on.
    """
    N, C, H, W = x.shape

    def signs(*shape: int) -> Tensor:
        return (2 * torch.randint(2, shape, generator=generator) - 1).to(x)

    best = (x + epsilon * signs(N, C, 1, W)).clamp(0, 1)  # vertical stripes
    score = margin(model(best), y, None)
    for i in range(1, queries):
        todo = (score <= 0).nonzero().squeeze(1)
        if len(todo) == 0:
            break
        side = side_of(i / queries, H, W)
        top = torch.randint(H - side + 1, (len(todo),), generator=generator)
        left = torch.randint(W - side + 1, (len(todo),), generator=generator)
        inside = window(top, side, H)[:, None, :, None] & window(left, side, W)[:, None, None, :]
        changed = x[todo] + epsilon * signs(len(todo), C, 1, 1)
        tried = torch.where(inside.to(x.device), changed.clamp(0, 1), best[todo])
        new = margin(model(tried), y[todo], None)
        better = new > score[todo]
        best[todo[better]], score[todo[better]] = tried[better], new[better]
    return best


def side_of(progress: float, H: int, W: int) -> int:
    """The squares' side after this share of the queries."""
    share = FIRST_SHARE / 2 ** sum(progress > limit for limit in HALVINGS)
    return max(1, min(H, W, round((share * H * W) ** 0.5)))


def window(start: Tensor, length: int, size: int) -> Tensor:
    """`(N,)` starts to bool `(N, size)`: true on `length` places from the start."""
    place = torch.arange(size)
    return (place >= start[:, None]) & (place < start[:, None] + length)
