"""What a count is worth: Wilson's interval, the exact test of paired answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, from 0 to 1 (Wilson, 1927)."""
    share, z2 = hits / n, Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


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
    return f"{100 * hits / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
