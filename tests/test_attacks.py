"""Attacks: geometry against references, properties on a trained network, state, public libraries."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attacks import APGD, FGSM, LOSSES, PGD, checkpoints, cosine, fooled, under_attack
from geometry import Pixels, project, random_start, size, steepest
from student_code import PGDAttack

NORMS = ("linf", "l2", "l1")
RADIUS = {"linf": 8 / 255, "l2": 0.6, "l1": 8.0}  # in pixels of [0, 1], for images 3x16x16
PIXEL = Pixels("pixel")
MEAN = torch.tensor(PIXEL.mean).view(1, 3, 1, 1)
STD = torch.tensor(PIXEL.std).view(1, 3, 1, 1)
CLASSES = 6


class Net(nn.Module):
    """BatchNorm and dropout on purpose: both must be in evaluation mode during an attack."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(512, CLASSES),
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


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        x, y = batch(64, step + 1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return batch(96, 1000)


def accuracy(model, x, y) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def pixels_of(x):
    return x * STD + MEAN


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attacks(**common):
    return [kind(norm=p, epsilon=RADIUS[p], pixels=PIXEL, generator=seeded(), **common)
            for p in NORMS for kind in (PGD, FGSM, APGD)]
