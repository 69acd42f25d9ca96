"""What counts are worth: the exact test of paired answers, an interval in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from deepvision.attacks.diagnostics import wilson


def mcnemar(fixed: int, broken: int) -> float:
    """Two-sided p of as uneven a split of the changed answers by a fair coin (McNemar, exact)."""
    n, few = fixed + broken, min(fixed, broken)
    tail = sum(math.comb(n, k) for k in range(few + 1)) / 2**n
    return min(1.0, 2 * tail)


@dataclass(frozen=True)
class Paired:
    """How the answers of the same images change: `fixed` became right, `broken` wrong."""

    n: int
    fixed: int
    broken: int

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> Paired:
        """From two bool tensors `(N,)`, true where the answer is right."""
        fixed, broken = (after & ~before).sum().item(), (before & ~after).sum().item()
        return cls(len(before), fixed, broken)

    @property
    def gain(self) -> float:
        """In percentage points."""
        return 100 * (self.fixed - self.broken) / self.n

    @property
    def p(self) -> float:
        return mcnemar(self.fixed, self.broken)


def percent(hits: int, n: int) -> str:
    """`52.4 [48.0, 56.7]`."""
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.1f} [{low:.1f}, {high:.1f}]"
