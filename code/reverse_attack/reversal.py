"""Reversal: a small change of an image that makes its random views agree again.

Mao et al., 2021, section 3.2 (algorithm 1). It uses no label and no loss of the classifier, which
then predicts from the changed image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepvision.attacks import PGD, InputScale, random_start

# Radii of the attacks: in 1/255 for l_inf, on images in [0, 1] for the others
BUDGETS = {"linf": 8.0, "l2": 0.5, "l1": 12.0}
REVERSAL_FACTOR = 2  # radius of the reversal / radius of the attack (section 4)


def input_scale(norm: str) -> InputScale:
    """The unit of epsilon and step size: 1/255 for l_inf, images in [0, 1] otherwise."""
    return InputScale("255" if norm == "linf" else "pixel", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Reversal:
    """Steepest descent of a contrastive loss within the ball around each image.

    loss: images (N, 3, H, W) in [0, 1] to losses (N,); its `generator` draws the views.
    epsilon, step_size: in the unit of `input_scale(norm)`; by default twice the attack's budget,
        and an eighth of epsilon (2/255 for the l_inf budget of 16/255).
    random_start: start uniformly within the ball, as the paper does, not at the image.
    """

    loss: nn.Module
    norm: str = "linf"
    epsilon: float | None = None
    step_size: float | None = None
    steps: int = 40
    random_start: bool = False

    @property
    def radius(self) -> float:
        """epsilon, or its default for the norm."""
        return REVERSAL_FACTOR * BUDGETS[self.norm] if self.epsilon is None else self.epsilon

    def __call__(self, x: Tensor, seed: int) -> Tensor:
        """The last iterate (N, 3, H, W); all its random numbers follow from `seed`."""
        self.loss.generator.manual_seed(seed)
        descent = PGD(
            norm=self.norm,
            epsilon=self.radius,
            step_size=self.radius / 8 if self.step_size is None else self.step_size,
            steps=self.steps,
            loss=negative,
            random_start=self.random_start,
            pixels=input_scale(self.norm),
            generator=torch.Generator().manual_seed(seed),
        )
        dummy_labels = torch.zeros(len(x), dtype=torch.long, device=x.device)  # PGD requires some
        return descent.perturb(self.loss, x, dummy_labels).clamp(0, 1)


def negative(loss: Tensor, *_: Tensor | None) -> Tensor:
    """The loss that PGD ascends, so that the contrastive loss (N,) descends."""
    return -loss


def add_noise(x: Tensor, norm: str, epsilon: float, seed: int) -> Tensor:
    """The control: images (N, 3, H, W) moved at random within the reversal's ball."""
    generator = torch.Generator().manual_seed(seed)
    scale = input_scale(norm)
    lo, hi = scale.delta_bounds(x)
    delta = random_start(lo, hi, norm, epsilon, generator)
    return (x + delta / scale.scale(x)).clamp(0, 1)
