"""Images of 32 x 32 in memory, and a SimpleNet trained on them: for the adversarial benchmarks.

A class-folder layout is read, root/train/CLASS/* and root/test/CLASS/*, as the cifar10 pack has it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))

from custom_transforms import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402
from deepvision.attacks import InputScale  # noqa: E402
from deepvision.training import engine  # noqa: E402
from deepvision.training.engine import DeviceContext, EpochMetrics, StepTimer  # noqa: E402
from deepvision.training.objectives import Objective  # noqa: E402
from student_code import SimpleNet  # noqa: E402
from utils import LinearWarmupCosineAnnealingLR, load_image, resize_image  # noqa: E402

SIDE, PAD, BATCH = 32, 4, 64
PIXELS = InputScale("255", IMAGENET_MEAN, IMAGENET_STD)


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
    """Shuffled batches, each shifted by up to 4 pixels and half of its images mirrored."""
    g = torch.Generator().manual_seed(seed)
    padded = nn.functional.pad(x, (PAD,) * 4, mode="reflect")
    for chosen in torch.randperm(len(x), generator=g).split(BATCH)[: len(x) // BATCH]:
        top, left = torch.randint(2 * PAD + 1, (2,), generator=g).tolist()
        images = padded[chosen, :, top : top + SIDE, left : left + SIDE]
        mirror = torch.rand(len(images), 1, 1, 1, generator=g) < 0.5
        yield torch.where(mirror, images.flip(3), images), y[chosen]


def train(objective: Objective, x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    """A SimpleNet from scratch by the engine of main.py: SGD, warm-up of an epoch, cosine."""
    torch.manual_seed(seed)
    place = DeviceContext(torch.device("cpu"))
    model = SimpleNet(num_classes=int(y.max()) + 1).to(memory_format=place.memory_format)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    steps = len(x) // BATCH
    scheduler = LinearWarmupCosineAnnealingLR(optimizer, steps, epochs * steps)
    for epoch in range(epochs):
        passes = engine.train_epoch(
            model,
            batches(x, y, seed * epochs + epoch),
            nn.CrossEntropyLoss(),
            optimizer,
            scheduler,
            place,
            EpochMetrics(place.device),
            StepTimer(),
            seed=seed,
            objective=objective,
        )
        for _ in passes:
            pass
    return model.eval()
