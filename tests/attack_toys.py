"""Networks, images and budgets that the tests of the attacks share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from deepvision.attacks import InputScale

NORMS = ("linf", "l2", "l1")
RADIUS = {"linf": 16 / 255, "l2": 1.2, "l1": 16.0}  # in pixels of [0, 1], for images 3x16x16
PIXEL = InputScale("pixel")
MEAN = torch.tensor(PIXEL.mean).view(1, 3, 1, 1)
STD = torch.tensor(PIXEL.std).view(1, 3, 1, 1)
CLASSES = 6
SLACK = 0.06  # CPUs round differently, so the trained network differs between machines


class Net(nn.Module):
    """BatchNorm and dropout on purpose: both must be in evaluation mode during an attack."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(256, CLASSES),
        )

    def forward(self, x):
        return self.body(x)


def batch(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Six smooth random templates under strong noise: normalised images and labels."""
    templates = torch.rand(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=g)
    x = F.interpolate(templates, size=16, mode="bilinear")[y]
    x = 0.25 + 0.5 * x + 0.25 * torch.randn(x.shape, generator=g)
    return (x.clamp(0, 1) - MEAN) / STD, y


def train_net() -> nn.Module:
    """A `Net` that classifies almost all images of `batch`."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        x, y = batch(64, step + 1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def accuracy(model, x, y) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def share_fooled(model, x, y) -> torch.Tensor:
    with torch.no_grad():
        return model(x).argmax(1) != y


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(kind, norm: str, **kwargs):
    """An attack of the usual radius, in pixels of [0, 1], with its own random numbers."""
    defaults = {"epsilon": RADIUS[norm], "pixels": PIXEL, "generator": seeded()}
    return kind(norm=norm, **(defaults | kwargs))
