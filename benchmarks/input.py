"""Measure image loading: the course's transforms, and ours: step by step, fused, cached.

    python benchmarks/input.py data/sample
    python benchmarks/input.py DATA --images 1000 --rounds 9

One thread, from JPEG through torch's DataLoader to collated batches. The variants alternate within
each round, each in a separate process. The result is the median over rounds of images per second of
CPU time, which depends little on other work on the machine. Writes
results/input_benchmark.{json,md,png}.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from results_file import RESULTS, origin, origin_line
from side_by_side import Work, seconds
from torch.utils.data import DataLoader

from custom_affine import inscribed_size
from custom_dataloader import MiniPlacesLoader
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
from deepvision.config import OneLineParser
from deepvision.data import cache
from deepvision.data.loader import SeededLoader, training_batches
from deepvision.runtime.device import configure_backend
from deepvision.runtime.provenance import command_line

BATCH = 100
TENSOR = [ToTensor(), Normalize(IMAGENET_MEAN, IMAGENET_STD)]
OURS = {
    "train": [
        Scale(144),
        RandomHorizontalFlip(),
        RandomColor(0.15),
        RandomRotate(15),
        RandomSizedCrop(128),
        *TENSOR,
    ],
    "val": [Scale(144), CenterCrop(128), *TENSOR],
}


# ---------------------------------------------------------------------------------------------
# The course's transforms: a separate pass over the pixels for each, floats in between. All
# resampling here is bilinear; the course also draws slower methods.
# ---------------------------------------------------------------------------------------------


def float_color(img: np.ndarray) -> np.ndarray:
    """Scale each channel by a random factor: uint8 (H, W, 3), float32 in between."""
    gains = np.array([random.uniform(0.85, 1.15) for _ in range(3)], np.float32)
    return np.clip(img.astype(np.float32) * gains, 0, 255).astype(np.uint8)


def canvas_rotate(img: np.ndarray) -> np.ndarray:
    """Rotate on a canvas that holds the whole image, then crop the inscribed rectangle."""
    degrees, (h, w) = random.uniform(-15, 15), img.shape[:2]
    sin, cos = (abs(f(math.radians(degrees))) for f in (math.sin, math.cos))
    full_w, full_h = int(h * sin + w * cos), int(h * cos + w * sin)
    matrix = cv2.getRotationMatrix2D((w / 2, h / 2), degrees, 1.0)
    matrix[:, 2] += (full_w - w) / 2, (full_h - h) / 2
    rotated = cv2.warpAffine(img, matrix, (full_w, full_h))
    inner_w, inner_h = inscribed_size(w, h, math.radians(degrees))
    y, x = (full_h - inner_h) // 2, (full_w - inner_w) // 2
    return rotated[y : y + inner_h, x : x + inner_w]


def channel_normalize(tensor: torch.Tensor) -> torch.Tensor:
    """Normalise (3, H, W) in place, channel by channel."""
    for channel, mean, std in zip(tensor, IMAGENET_MEAN, IMAGENET_STD, strict=True):
        channel.sub_(mean).div_(std)
    return tensor


COURSE = {
    "train": [
        Scale(144),
        RandomHorizontalFlip(),
        float_color,
        canvas_rotate,
        RandomSizedCrop(128),
        ToTensor(),
        channel_normalize,
    ],
    "val": [Scale(144), CenterCrop(128), ToTensor(), channel_normalize],
}


class CourseImages(MiniPlacesLoader):
    """Reads images as the course does: decode to BGR, copy to RGB."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """An image after the transforms, and its label."""
        image = cv2.imread(f"{self.image_folder}/{self.paths[index]}")
        return self.transforms(np.ascontiguousarray(image[:, :, ::-1])), self.labels[index]


class StepByStep(Compose):
    """The transforms one after the other, never fused."""

    def __call__(self, img: np.ndarray) -> torch.Tensor:
        """uint8 (H, W, 3) -> float32 (3, 128, 128)."""
        for transform in self.transforms:
            img = transform(img)
        return img


# ---------------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------------


def make_loaders(data: Path, split: str, images: int) -> dict[str, DataLoader]:
    """The variants, over the same images; the others are compared with the first."""

    def subset(transforms: Compose, kind: type = MiniPlacesLoader) -> MiniPlacesLoader:
        dataset = kind(data, num_classes=10_000, split=split, transforms=transforms)
        step = max(1, len(dataset) // images)  # evenly spaced: every category
        dataset.skip(set(dataset.paths) - set(dataset.paths[::step][:images]))
        return dataset

    def plain(dataset: MiniPlacesLoader) -> DataLoader:
        return DataLoader(dataset, BATCH, shuffle=True, drop_last=True)

    cached = subset(Compose(OURS[split]))
    cache.enable_cache(cached, "ram", 0, torch.device("cpu"))
    return {
        "course transforms": plain(subset(StepByStep(COURSE[split]), CourseImages)),
        "ours, step by step": plain(subset(StepByStep(OURS[split]))),
        "ours, fused": plain(subset(Compose(OURS[split]))),
        "ours, fused, seeded": training_batches(subset(Compose(OURS[split])), BATCH, 2024, 0),
        "ours, cached in RAM": training_batches(cached, BATCH, 2024, 0),
    }


def prepare_pass(loader: DataLoader) -> Work:
    """A pass over all batches; the backend of a seeded loader's process is the trainer's."""
    if isinstance(loader, SeededLoader):
        configure_backend(torch.device("cpu"))

    def work() -> None:
        for _ in loader:
            pass

    return work


def measure(loaders: dict[str, DataLoader], rounds: int) -> dict[str, list[float]]:
    """Images per second of CPU time, of each variant in each round."""
    variants = {name: partial(prepare_pass, loader) for name, loader in loaders.items()}
    return {
        name: [len(loaders[name]) * BATCH / elapsed for elapsed in values]
        for name, values in seconds(variants, rounds).items()
    }


def summary(speeds: dict[str, list[float]]) -> list[dict]:
    """One row per variant: its median, and the median over rounds of its ratio to the first."""
    base = next(iter(speeds.values()))
    return [
        {
            "variant": name,
            "images_per_cpu_second": round(statistics.median(values), 1),
            "microseconds_per_image": round(1e6 / statistics.median(values), 1),
            "ratio": round(statistics.median(v / b for v, b in zip(values, base, strict=True)), 2),
            "rounds": [round(v, 1) for v in values],
        }
        for name, values in speeds.items()
    ]


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------


def table(result: dict) -> str:
    """The results as Markdown."""
    lines = [
        "# Input: from JPEG to collated batches, one core",
        "",
        f"{origin_line(result)} One thread. Medians of interleaved rounds; the ratio is taken "
        "within each round.",
        "",
        "| split | variant | images / CPU second | µs / image | ratio |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {split} | {row['variant']} | {row['images_per_cpu_second']:.0f} | "
        f"{row['microseconds_per_image']:.0f} | {row['ratio']:.2f} |"
        for split in ("train", "val")
        for row in result[split]
    ]
    return "\n".join(lines) + "\n"


def plot(result: dict, path: Path) -> None:
    """Horizontal bars: images per CPU second, by split and variant."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), sharey=True, layout="constrained")
    for axis, split in zip(axes, ("train", "val"), strict=True):
        rows = result[split][::-1]
        speeds = [row["images_per_cpu_second"] for row in rows]
        bars = axis.barh([row["variant"] for row in rows], speeds, color="#4477aa")
        axis.bar_label(bars, [f" {row['ratio']:.1f} ×" for row in rows])
        axis.set(title=split, xlabel="images per CPU second", xlim=(0, max(speeds) * 1.2))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> None:
    """Measure and write the results."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("data", type=Path, help="data folder in the MiniPlaces layout")
    parser.add_argument("--images", type=int, default=500, help="images per pass")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of all variants")
    args = parser.parse_args(argv[1:])
    torch.set_num_threads(1)
    result = origin(command_line(argv), opencv=cv2.__version__, numpy=np.__version__)
    for split in ("train", "val"):
        loaders = make_loaders(args.data, split, args.images)
        result[split] = summary(measure(loaders, args.rounds))
    target = RESULTS / "input_benchmark"
    target.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    target.with_suffix(".md").write_text(table(result), encoding="utf-8")
    plot(result, target.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main(sys.argv)
