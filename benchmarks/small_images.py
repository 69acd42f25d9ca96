"""Images of 32 x 32 in memory, and SimpleNet trained on them, for the adversarial benchmarks.

The images are in class folders: root/train/CLASS/*, root/test/CLASS/*.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import results_file  # noqa: F401 - makes code/ importable
import torch
from torch import Tensor, nn

from custom_transforms import IMAGENET_MEAN, IMAGENET_STD
from deepvision.attacks import InputScale
from deepvision.runtime.device import DeviceContext
from deepvision.runtime.meters import EpochMetrics, StepTimer
from deepvision.training.engine import train_epoch
from deepvision.training.objectives import Objective
from student_code import SimpleNet
from utils import LinearWarmupCosineAnnealingLR, load_image, resize_image

SIDE, PAD, BATCH = 32, 4, 64
SCALE = InputScale("255", IMAGENET_MEAN, IMAGENET_STD)


def load(folder: Path, images: int) -> tuple[Tensor, Tensor]:
    """The first `images` / K files of each of K classes: normalised (N, 3, 32, 32), (N,)."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [
        (file, k)
        for k, path in enumerate(classes)
        for file in sorted(path.iterdir())[: images // len(classes)]
    ]
    pixels = np.stack([resize_image(load_image(file), (SIDE, SIDE)) for file, _ in files])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return x, torch.tensor([k for _, k in files])


def batches(x: Tensor, y: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches; each is shifted by up to 4 pixels, half of its images are flipped."""
    g = torch.Generator().manual_seed(seed)
    padded = nn.functional.pad(x, (PAD,) * 4, mode="reflect")
    for chosen in torch.randperm(len(x), generator=g).split(BATCH)[: len(x) // BATCH]:
        top, left = torch.randint(2 * PAD + 1, (2,), generator=g).tolist()
        images = padded[chosen, :, top : top + SIDE, left : left + SIDE]
        flip = torch.rand(len(images), 1, 1, 1, generator=g) < 0.5
        yield torch.where(flip, images.flip(3), images), y[chosen]


def train(objective: Objective, x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    """SimpleNet from scratch on main.py's engine: SGD, one epoch of warmup, cosine decay."""
    torch.manual_seed(seed)
    context = DeviceContext(torch.device("cpu"))
    model = SimpleNet(num_classes=int(y.max()) + 1).to(memory_format=context.memory_format)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    steps = len(x) // BATCH
    scheduler = LinearWarmupCosineAnnealingLR(optimizer, steps, epochs * steps)
    for epoch in range(epochs):
        train_epoch(
            model,
            batches(x, y, seed * epochs + epoch),
            objective,
            optimizer,
            scheduler,
            context,
            EpochMetrics(context.device),
            StepTimer(),
            seed=seed,
        )
    return model.eval()
