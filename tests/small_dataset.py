"""A data set of noise in the MiniPlaces layout, and the course's two sequences of transforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from custom_transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    Compose,
    Normalize,
    RandomColor,
    RandomHorizontalFlip,
    RandomRotate,
    RandomSizedCrop,
    Scale,
    ToTensor,
)
from utils import save_image

NORMALIZE = Normalize(IMAGENET_MEAN, IMAGENET_STD)
AUGMENT = Compose(
    [
        Scale(144),
        RandomHorizontalFlip(),
        RandomColor(0.15),
        RandomRotate(15),
        RandomSizedCrop(128),
        ToTensor(),
        NORMALIZE,
    ]
)
VAL = Compose([Scale(144), CenterCrop(128), ToTensor(), NORMALIZE])
CATEGORIES = ["abbey", "bakery/shop", "coast"]


def make_root(root: Path, train: int, val: int) -> Path:
    """A folder in the MiniPlaces layout; image i is 64 x 64 noise of seed i."""
    for split, count in (("train", train), ("val", val)):
        rows = []
        for i in range(count):
            label = i % len(CATEGORIES)
            name = CATEGORIES[label]
            path = f"train/{name[0]}/{name}/{i:08d}.jpg" if split == "train" else f"val/{i:08d}.jpg"
            target = root / "images" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            save_image(target, noise)
            rows.append(f"{path} {label}\n")
        (root / f"{split}.txt").write_text("".join(rows))
    return root
