"""Confidence intervals of accuracies, and the exact test of paired predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of hits / n, in per cent (Wilson, 1927)."""
    share, centre = hits / n, (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * share * (1 - share) + z * z / 4)
    return max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))


def percent(hits: int, n: int) -> str:
    """hits / n in per cent with its Wilson interval: `52.4 [48.0, 56.7]`."""
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.1f} [{low:.1f}, {high:.1f}]"


def mcnemar(fixed: int, broken: int) -> float:
    """The two-sided p-value of McNemar's exact test: changes split evenly by chance."""
    n, few = fixed + broken, min(fixed, broken)
    tail = sum(math.comb(n, k) for k in range(few + 1)) / 2**n
    return min(1.0, 2 * tail)


@dataclass(frozen=True)
class Paired:
    """How predictions for the same n images change: `fixed` became right, `broken` wrong."""

    n: int
    fixed: int
    broken: int

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> Paired:
        """From two bool tensors (N,), true where the prediction is right."""
        fixed, broken = (after & ~before).sum().item(), (before & ~after).sum().item()
        return cls(len(before), fixed, broken)

    @property
    def gain(self) -> float:
        """The change of accuracy, in percentage points."""
        return 100 * (self.fixed - self.broken) / self.n

    @property
    def p(self) -> float:
        """The p-value of McNemar's exact test."""
        return mcnemar(self.fixed, self.broken)
