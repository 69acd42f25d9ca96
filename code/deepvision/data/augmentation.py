"""Settings of the course's augmentation: size by epoch, area of crops, rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from custom_dataloader import MiniPlacesLoader
from custom_transforms import AUGMENTATION, Normalize, RandomRotate, RandomSizedCrop, ToTensor
from utils import UserError


@dataclass
class ResolutionSchedule:
    """Sets the size of a crop at the start of each epoch; travels to workers with its data set.

    sizes: pixels, by epoch from 0.
    """

    crop: RandomSizedCrop
    sizes: Sequence[int]

    def set_epoch(self, epoch: int) -> None:
        """Crop to the size of this epoch, from 0; epochs past the end have the last size."""
        size = self.sizes[min(epoch, len(self.sizes) - 1)]
        self.crop.size = size, size


def parse_resolution(text: str) -> list[tuple[int, float]]:
    """`96:0.6,128` as [(96, 0.6), (128, 1.0)]: a size in pixels and where in the run it ends.

    Raises:
        ValueError: a size is not from 32 to 512, or the fractions do not grow.
    """
    *steps, last = text.split(",")
    pairs = [step.split(":") for step in steps] + [(last, 1)]
    schedule = [(int(size), float(end)) for size, end in pairs]
    ends = [0.0, *(end for _, end in schedule)]
    sizes_fit = all(32 <= size <= 512 for size, _ in schedule)
    if not (sizes_fit and all(a < b for a, b in pairwise(ends))):
        raise ValueError(text)
    return schedule


def sizes_by_epoch(schedule: Sequence[tuple[int, float]], epochs: int) -> list[int]:
    """The size of each epoch. schedule: (size, fraction of the run at which it ends)."""
    sizes: list[int] = []
    for size, end in schedule:
        sizes += [size] * (round(end * epochs) - len(sizes))
    return sizes


def adapt_augmentation(
    dataset: MiniPlacesLoader, sizes: Sequence[int], crop_area: float, rotation: float
) -> None:
    """Give the course's transforms of `dataset` these settings.

    sizes: pixels, by epoch; crop_area: the least area of a crop, as a fraction of the image;
    rotation: the largest rotation in degrees.

    Raises:
        UserError: the transforms are not the course's.
    """
    steps = getattr(dataset.transforms, "transforms", [])
    if tuple(map(type, steps)) != (*AUGMENTATION, ToTensor, Normalize):
        raise UserError(
            "get_train_transforms is not the course's: to use it, add "
            "--resolution=128 --crop-area=0.25 --rotation=15"
        )
    crop = RandomSizedCrop(sizes[0], (crop_area, 1.0))
    steps[3:5] = RandomRotate(rotation), crop
    dataset.set_epoch = ResolutionSchedule(crop, sizes).set_epoch
