"""Networks, each with one flaw, and images for the tests of diagnostics and Square."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from deepvision.attacks import PGD, InputScale

PIXELS = InputScale("255", (0.5, 0.4, 0.6), (0.25, 0.2, 0.3))
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (PIXELS.mean, PIXELS.std))
CLASSES, SIDE = 6, 12
RADIUS = {"linf": 16, "l2": 320, "l1": 2600}


class Healthy(nn.Module):
    """Compares an image with six smooth templates; no training needed."""

    def __init__(self):
        super().__init__()
        small = torch.rand(CLASSES, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        templates = F.interpolate(small, size=SIDE, mode="bilinear")
        self.templates = nn.Parameter(templates - templates.mean(0))

    def forward(self, x):
        pixels = x * STD + MEAN
        return torch.einsum("nchw,kchw->nk", pixels - 0.5, self.templates)


class Quantised(Healthy):
    def forward(self, x):
        return super().forward((x * 8).round() / 8)


class Randomised(Healthy):
    def forward(self, x):
        return super().forward(x + 1e-3 * torch.randn_like(x))


class Saturated(Healthy):
    """Its softmax rounds to 0 and 1, so that the cross-entropy has half a gradient or none."""

    def forward(self, x):
        return 20 * super().forward(x)


class Trap(Healthy):
    """A seventh logit follows the largest one at a distance of 1: the margin never shrinks."""

    def forward(self, x):
        z = super().forward(x)
        return torch.cat([z, z.amax(1, keepdim=True) - 1], 1)


class Stubborn(Healthy):
    """Predicts class 0 for every image."""

    def forward(self, x):
        return 1e-3 * super().forward(x) + torch.eye(CLASSES)[0]


def images() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    y = torch.arange(60) % CLASSES
    templates = Healthy().templates.detach()
    pixels = 0.5 + 0.2 * templates[y] + 0.1 * torch.randn(60, 3, SIDE, SIDE, generator=g)
    return (pixels.clamp(0, 1) - MEAN) / STD, y


def pgd(norm: str = "linf", **options) -> PGD:
    return PGD(norm=norm, pixels=PIXELS, **{"epsilon": RADIUS[norm], "steps": 10} | options)
