"""Reversal: a small change of an image's pixels that makes its views agree again.

Mao et al., 2021, section 3.2 (algorithm 1). No label and no loss of the classifier is involved: the
classifier then sees the changed image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepvision.attacks.norms import InputScale, random_start
from deepvision.attacks.pgd import PGD

# The budgets of the attacks: of [0, 255] in l_inf, of [0, 1] in the others
BUDGETS = {"linf": 8.0, "l2": 0.5, "l1": 12.0}
REVERSAL_FACTOR = 2  # the defence may move a pixel twice as far as the attack


def pixels_of(norm: str) -> InputScale:
    """The unit of epsilon and step size: levels of 255 for l_inf, pixels of [0, 1] otherwise."""
    return InputScale("255" if norm == "linf" else "pixel", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Reversal:
    """Steepest descent of `loss`, pixels `(N, 3, H, W)` to `(N,)`, within the ball around x.

    epsilon, step_size: in the unit of `pixels_of(norm)`; by default twice the attack's budget, in
    eighths of it (2/255 for the l_inf budget of 16/255).
    """

    loss: nn.Module
    norm: str = "linf"
    epsilon: float | None = None
    step_size: float | None = None
    steps: int = 40

    @property
    def radius(self) -> float:
        return REVERSAL_FACTOR * BUDGETS[self.norm] if self.epsilon is None else self.epsilon

    def __call__(self, x: Tensor, seed: int) -> Tensor:
        """The last iterate; the views of all steps follow from `seed`."""
        self.loss.generator.manual_seed(seed)
        step_size = self.radius / 8 if self.step_size is None else self.step_size
        descent = PGD(
            norm=self.norm,
            epsilon=self.radius,
            step_size=step_size,
            steps=self.steps,
            loss=minus,
            pixels=pixels_of(self.norm),
        )
        nobody = torch.zeros(len(x), dtype=torch.long, device=x.device)  # PGD asks for labels
        return descent.perturb(self.loss, x, nobody).clamp(0, 1)


def minus(loss: Tensor, *_: Tensor | None) -> Tensor:
    """What PGD ascends, so that the loss descends."""
    return -loss


def noise(x: Tensor, norm: str, epsilon: float, seed: int) -> Tensor:
    """The control: x moved at random within the ball that the reversal has."""
    generator = torch.Generator().manual_seed(seed)
    pixels = pixels_of(norm)
    lo, hi = pixels.delta_bounds(x)
    delta = random_start(lo, hi, norm, epsilon, generator)
    return (x + delta / pixels.scale(x)).clamp(0, 1)
