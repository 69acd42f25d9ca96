"""The geometry of attacks: l_inf, l_2 and l_1 balls within the box of valid pixels. Torch alone.

A perturbation `delta` `(N, ...)` counts in the unit of epsilon and stays between `lo` <= 0 and
`hi` >= 0: the room that each pixel has before it is darker than black or brighter than white.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

ORDER = {"linf": math.inf, "l2": 2, "l1": 1}


@dataclass(frozen=True)
class InputScale:
    """What epsilon and step size count, and how a model's input follows from the pixels.

    The input is (pixel - mean) / std with pixels in [0, 1] and one value per channel (dimension 1).
    unit "normalised": epsilon counts in the input itself, alike for every channel;
    unit "pixel": in pixels of [0, 1] (epsilon = 8 / 255); unit "255": of [0, 255] (epsilon = 8).
    """

    unit: str = "normalised"
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        if self.unit not in ("normalised", "pixel", "255"):
            raise ValueError(f"unknown unit {self.unit!r}: normalised, pixel or 255")

    def per_channel(self, values: Sequence[float], x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != len(values):
            raise ValueError(
                f"mean and std have {len(values)} channels, the input is {tuple(x.shape)}: "
                "pass Pixels(unit, mean, std) for this input"
            )
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return _on_device(tuple(values), x.dtype, x.device).view(shape)

    def scale(self, x: Tensor) -> Tensor:
        """How many units of epsilon one unit of the model's input is, per channel."""
        std = self.per_channel(self.std, x)
        return {"normalised": torch.ones_like(std), "pixel": std, "255": 255 * std}[self.unit]

    def delta_bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of delta, in units of epsilon, that keep every pixel of `x` + delta in [0, 1]."""
        mean, std = self.per_channel(self.mean, x), self.per_channel(self.std, x)
        lo, hi = (0 - mean) / std - x, (1 - mean) / std - x
        return lo.clamp(max=0) * self.scale(x), hi.clamp(min=0) * self.scale(x)


@lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy to a GPU waits until all that was asked of it before is done: one is enough."""
    with torch.inference_mode(False):  # else a training step could not use it
        return torch.tensor(values, dtype=dtype, device=device)


def column(values: Tensor, like: Tensor) -> Tensor:
    """`(N,)` -> `(N, 1, ...)`, to broadcast against `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def size(delta: Tensor, norm: str) -> Tensor:
    """The norm of each sample, shaped to broadcast against delta: `(N, 1, ...)`."""
    flat = torch.linalg.vector_norm(delta.flatten(1), ord=ORDER[norm], dim=1)
    return column(flat, delta)


def steepest_step(g: Tensor, norm: str, k: int | Tensor = 1) -> Tensor:
    """The step of unit norm along which a function with gradient `g` ascends fastest.

    In l_1 that step would move one pixel; it moves the `k` largest instead, all by as much
    (Tramer & Boneh, 2019, section 3.2). `k` may differ between samples: `(N,)`.
    """
    if norm == "linf":
        return g.sign()
    if norm == "l2":
        return g / size(g, "l2").clamp(min=torch.finfo(g.dtype).tiny)
    flat = g.flatten(1).abs()
    k = torch.as_tensor(k, device=g.device).clamp(1, flat.shape[1]).expand(len(flat)).view(-1, 1)
    least = flat.topk(int(k.max()), dim=1).values.gather(1, k - 1)  # (N, 1)
    step = torch.where(flat >= least, g.flatten(1).sign(), 0).view(g.shape)
    return step / size(step, "l1").clamp(min=1)


def project(delta: Tensor, norm: str, epsilon: float, lo: Tensor, hi: Tensor) -> Tensor:
    """The point nearest to delta (Euclidean) within the epsilon ball and the box [lo, hi].

    A nearest point has delta's signs and, coordinate by coordinate, a magnitude of at most
    `cap`, so the two norms with a non-trivial answer are solved for magnitudes `u` alone.
    """
    if norm == "linf":
        return torch.minimum(torch.maximum(delta.clamp(-epsilon, epsilon), lo), hi)
    u = delta.flatten(1).abs()
    cap = torch.minimum(u, torch.where(delta > 0, hi, -lo).flatten(1))
    shrunk = (_shrink_l2 if norm == "l2" else _shrink_l1)(u, cap, epsilon)
    return torch.copysign(shrunk.view(delta.shape), delta)


def _shrink_l2(u: Tensor, cap: Tensor, epsilon: float) -> Tensor:
    """min(s u, cap) with the largest s <= 1 of norm <= epsilon; u, cap: `(N, d)`.

    Without caps s = epsilon / |u|, too small if any coordinate hits its cap. Each round fixes
    those that do and solves for the rest, so s only grows and the true one is reached exactly.
    """
    s, capped = u.new_zeros(len(u), 1), torch.zeros_like(u, dtype=torch.bool)
    while True:
        rest = (epsilon**2 - cap.square().mul(capped).sum(1, keepdim=True)).clamp(min=0)
        free = u.square().mul(~capped).sum(1, keepdim=True)
        s = (rest / free).sqrt().nan_to_num(nan=1.0).clamp(max=1).maximum(s)  # 0 / 0: none free
        newly = (s * u >= cap) & ~capped
        if not newly.any():
            return torch.minimum(s * u, cap)
        capped |= newly


def _shrink_l1(u: Tensor, cap: Tensor, epsilon: float) -> Tensor:
    """min(max(u - t, 0), cap) with the least t >= 0 whose sum is <= epsilon; u, cap: `(N, d)`.

    Croce & Hein, 2021, proposition 2.1. Halving an interval costs less than the sorting in there;
    the sum is linear between two neighbouring kinks, so the last step is exact.
    """
    low, high = u.new_zeros(len(u), 1), u.amax(1, keepdim=True)
    for _ in range(30):
        t = (low + high) / 2
        over = torch.minimum((u - t).clamp_(min=0), cap).sum(1, keepdim=True) > epsilon
        low, high = torch.where(over, t, low), torch.where(over, high, t)
    t = (low + high) / 2
    capped = u - cap >= t
    free = (u > t) & ~capped
    excess = (u * free + cap * capped).sum(1, keepdim=True) - epsilon
    t = (excess / free.sum(1, keepdim=True).clamp(min=1)).maximum(low).minimum(high)
    return torch.minimum((u - t).clamp(min=0), cap)


def random_start(
    lo: Tensor, hi: Tensor, norm: str, epsilon: float, generator: torch.Generator | None = None
) -> Tensor:
    """A delta drawn uniformly from the ball, what leaves the box clipped (l_inf: from both)."""
    N, d = lo.flatten(1).shape
    if norm == "linf":
        lo, hi = lo.clamp(min=-epsilon), hi.clamp(max=epsilon)
        return lo + (hi - lo) * sample_like(torch.rand, lo.shape, lo, generator)
    if norm == "l2":
        direction = sample_like(torch.randn, (N, d + 2), lo, generator)
        # The first d coordinates of a point on the sphere in d + 2 are uniform in the ball in d.
    else:
        v = 2 * sample_like(torch.rand, (N, d + 1), lo, generator) - 1
        direction = -v.sign() * v.abs().clamp(min=torch.finfo(v.dtype).tiny).log()
        # d of d + 1 exponential magnitudes over their sum: uniform in the simplex.
    delta = epsilon * direction[:, :d] / size(direction, norm)
    return torch.minimum(torch.maximum(delta.view(lo.shape), lo), hi)


def sample_like(kind: Callable, shape: Sequence[int], like: Tensor, generator, *args) -> Tensor:
    """Random numbers from the generator's own device, so that a seed means the same anywhere."""
    device = like.device if generator is None else generator.device
    return kind(*args, tuple(shape), generator=generator, device=device).to(like)
