"""l_inf, l_2 and l_1 balls, intersected with the box of valid pixels. Needs torch only.

A perturbation `delta` (N, ...) is in the unit of epsilon and stays within [lo, hi], lo <= 0 <= hi:
the bounds that keep every pixel of x + delta valid.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}
EPSILONS = {"linf": 4, "l2": 512, "l1": 10240}  # defaults, of 255; l_2: 2, l_1: 40 of [0, 1]


TOLERANCE = 1 / 255  # beyond [0, 1]: rounding, of bfloat16 too
NARROW = 0.35  # of [0, 1]; images in [0, 1] treated as normalised ones span 0.23


@dataclass(frozen=True)
class InputScale:
    """The unit of epsilon and step size, and how a model's input follows from pixels.

    The input is (pixel - mean) / std with pixels in [0, 1]; mean and std have one value per channel
    (dimension 1). Units: "normalised" is the input's, the same for every channel; "pixel" is that
    of pixels in [0, 1] (epsilon = 8 / 255); "255" that of 8-bit levels (epsilon = 8).

    Raises:
        ValueError: the unit is unknown.
    """

    unit: str = "normalised"
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        if self.unit not in ("normalised", "pixel", "255"):
            raise ValueError(f"unknown unit {self.unit!r}: normalised, pixel or 255")

    def per_channel(self, values: Sequence[float], x: Tensor) -> Tensor:
        """One value per channel, shaped to broadcast against x: (1, C, 1, ...).

        Raises:
            ValueError: x has another number of channels.
        """
        if x.dim() < 2 or x.shape[1] != len(values):
            raise ValueError(
                f"mean and std have {len(values)} channels, the input is {tuple(x.shape)}: "
                "pass InputScale(unit, mean, std) for this input"
            )
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return on_device(tuple(values), x.dtype, x.device).view(shape)

    def scale(self, x: Tensor) -> Tensor:
        """Units of epsilon per unit of the model's input: (1, C, 1, ...)."""
        std = self.per_channel(self.std, x)
        return {"normalised": torch.ones_like(std), "pixel": std, "255": 255 * std}[self.unit]

    def misfit(self, x: Tensor) -> str | None:
        """Why x (N, C, ...) does not look like images under this mean and std; None if it does."""
        values = x.float() * self.per_channel(self.std, x) + self.per_channel(self.mean, x)
        low, high = values.min().item(), values.max().item()
        found = f"the inputs span pixels of {low:.2f} to {high:.2f} under the stated mean and std"
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
            return f"{found}, outside [0, 1]"
        return f"{found}, a small part of [0, 1]" if high - low < NARROW else None

    def check(self, x: Tensor) -> None:
        """Warn of inputs x (N, C, ...) in a small part of the pixel range.

        Raises:
            ValueError: some are outside, so that mean and std are not those of the inputs.
        """
        misfit = self.misfit(x)
        if misfit and misfit.endswith("outside [0, 1]"):
            raise ValueError(misfit)
        if misfit:
            warnings.warn(misfit, stacklevel=2)

    def box_radius(self, x: Tensor, norm: str) -> float:
        """The norm of the change from all-black to all-white for one sample of x, as epsilon."""
        if len(x) == 0:
            return math.inf
        # in Python: a value read from the GPU would wait for it in every training step
        units = {"normalised": [1 / s for s in self.std], "pixel": [1.0], "255": [255.0]}[self.unit]
        widths = units if len(units) > 1 else units * len(self.std)
        if norm == "linf":
            return max(widths)
        p, n = ORDERS[norm], x[0, 0].numel()
        return (n * sum(w**p for w in widths)) ** (1 / p)

    def delta_bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(lo, hi): the bounds of delta, in units of epsilon, that keep pixels in [0, 1]."""
        mean, std = self.per_channel(self.mean, x), self.per_channel(self.std, x)
        lo, hi = (0 - mean) / std - x, (1 - mean) / std - x
        return lo.clamp(max=0) * self.scale(x), hi.clamp(min=0) * self.scale(x)


@lru_cache(maxsize=64)
def on_device(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A cached copy of constants: each copy to a GPU waits for all the work queued there."""
    with torch.inference_mode(False):  # autograd cannot use an inference tensor
        return torch.tensor(values, dtype=dtype, device=device)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, ...), to broadcast against `like` (N, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def lp_norm(delta: Tensor, norm: str) -> Tensor:
    """The norm of each sample of delta (N, ...), shaped to broadcast against it: (N, 1, ...)."""
    flat = torch.linalg.vector_norm(delta.flatten(1), ord=ORDERS[norm], dim=1)
    return per_sample(flat, delta)


def steepest_step(g: Tensor, norm: str, k: int | Tensor = 1) -> Tensor:
    """The direction of unit norm in which a function with gradient `g` (N, ...) rises fastest.

    In l_1 this would change one coordinate; the step changes the `k` with the largest gradient by
    the same amount (Tramer & Boneh, 2019, section 3.2). `k` is a number or one per sample (N,).
    """
    if norm == "linf":
        return g.sign()
    if norm == "l2":
        return g / lp_norm(g, "l2").clamp(min=torch.finfo(g.dtype).tiny)
    flat = g.flatten(1).abs()
    k = torch.as_tensor(k, device=g.device).clamp(1, flat.shape[1]).expand(len(flat)).view(-1, 1)
    least = flat.topk(int(k.max()), dim=1).values.gather(1, k - 1)  # (N, 1)
    step = torch.where(flat >= least, g.flatten(1).sign(), 0).view(g.shape)
    return step / lp_norm(step, "l1").clamp(min=1)


def project(delta: Tensor, norm: str, epsilon: float, lo: Tensor, hi: Tensor) -> Tensor:
    """The Euclidean projection of delta onto the intersection of epsilon ball and box [lo, hi].

    The nearest point keeps delta's signs, and each magnitude is at most `cap`. So l_2 and l_1 are
    solved for the magnitudes `u` alone.
    """
    if norm == "linf":
        return torch.minimum(torch.maximum(delta.clamp(-epsilon, epsilon), lo), hi)
    u = delta.flatten(1).abs()
    cap = torch.minimum(u, torch.where(delta > 0, hi, -lo).flatten(1))
    shrunk = (_shrink_l2 if norm == "l2" else _shrink_l1)(u, cap, epsilon)
    return torch.copysign(shrunk.view(delta.shape), delta)


def _shrink_l2(u: Tensor, cap: Tensor, epsilon: float) -> Tensor:
    """min(s u, cap) with the largest s <= 1 whose norm is <= epsilon; u, cap: (N, d).

    Without caps s = epsilon / |u|, which is too small if a coordinate reaches its cap. Each round
    fixes those that do and solves for the others: s only grows, and the last value is exact.
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
    """min(max(u - t, 0), cap) with the least t >= 0 whose sum is <= epsilon; u, cap: (N, d).

    Croce & Hein, 2021, proposition 2.1. Bisection costs less than their sort; the sum is linear
    between two breakpoints, so the last step is exact.
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
    """A delta (N, ...) drawn uniformly from the ball and clipped to the box.

    In l_inf it is uniform in the intersection of the two.
    """
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
    delta = epsilon * direction[:, :d] / lp_norm(direction, norm)
    return torch.minimum(torch.maximum(delta.view(lo.shape), lo), hi)


def sample_like(kind: Callable, shape: Sequence[int], like: Tensor, generator, *args) -> Tensor:
    """Random numbers of `kind` (torch.rand, ...), with the dtype and device of `like`.

    They are drawn on the generator's device, so that a seed gives the same numbers on any device.
    """
    device = like.device if generator is None else generator.device
    return kind(*args, tuple(shape), generator=generator, device=device).to(like)
