"""How fast images reach the trainer: the course's way, ours step by step, ours fused, ours cached.

    python benchmarks/input.py data/sample
    python benchmarks/input.py DATA --images 1000 --rounds 9

One thread, from JPEG through torch's DataLoader to collated batches. The ways take turns within
each round, each in a process of its own; what is reported is the median of the rounds, in images
per second of CPU time, so that other work on the machine counts little. Writes
results/input_benchmark.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from functools import partial
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from results_file import circumstances, processor, told
from side_by_side import Work, cpu_seconds
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))

from custom_affine import inscribed_size  # noqa: E402
from custom_dataloader import MiniPlacesLoader  # noqa: E402
from custom_transforms import (  # noqa: E402
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
from deepvision.data import cache  # noqa: E402
from deepvision.data.loader import SeededLoader, training_batches  # noqa: E402
from deepvision.training.engine import DeviceContext  # noqa: E402

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
# The course's way: one pass over the pixels after another, floats in between. All its resampling
# is bilinear here; the course draws among slower methods as well.
# ---------------------------------------------------------------------------------------------


def float_color(img: np.ndarray) -> np.ndarray:
    gains = np.array([random.uniform(0.85, 1.15) for _ in range(3)], np.float32)
    return np.clip(img.astype(np.float32) * gains, 0, 255).astype(np.uint8)


def canvas_rotate(img: np.ndarray) -> np.ndarray:
    """Turn on a canvas that holds all of the image, then cut the inner rectangle out."""
    degrees, (h, w) = random.uniform(-15, 15), img.shape[:2]
    sin, cos = (abs(f(math.radians(degrees))) for f in (math.sin, math.cos))
    full_w, full_h = int(h * sin + w * cos), int(h * cos + w * sin)
    matrix = cv2.getRotationMatrix2D((w / 2, h / 2), degrees, 1.0)
    matrix[:, 2] += (full_w - w) / 2, (full_h - h) / 2
    turned = cv2.warpAffine(img, matrix, (full_w, full_h))
    inner_w, inner_h = inscribed_size(w, h, math.radians(degrees))
    y, x = (full_h - inner_h) // 2, (full_w - inner_w) // 2
    return turned[y : y + inner_h, x : x + inner_w]


def channel_normalize(tensor: torch.Tensor) -> torch.Tensor:
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
    """Reads as the course does: decode to BGR, copy to RGB."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = cv2.imread(f"{self.image_folder}/{self.paths[index]}")
        return self.transforms(np.ascontiguousarray(image[:, :, ::-1])), self.labels[index]


class StepByStep(Compose):
    """The transforms one after the other, never fused."""

    def __call__(self, img: np.ndarray) -> torch.Tensor:
        for transform in self.transforms:
            img = transform(img)
        return img


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------


def loaders(data: Path, split: str, images: int) -> dict[str, DataLoader]:
    """The ways to compare, over the same images; the first is the one the others are held to."""

    def subset(transforms: Compose, kind: type = MiniPlacesLoader) -> MiniPlacesLoader:
        dataset = kind(data, num_classes=10_000, split=split, transforms=transforms)
        step = max(1, len(dataset) // images)  # all over the list: every category
        dataset.skip(set(dataset.paths) - set(dataset.paths[::step][:images]))
        return dataset

    def plain(*way: object) -> DataLoader:
        return DataLoader(subset(*way), BATCH, shuffle=True, drop_last=True)

    cached = subset(Compose(OURS[split]))
    cache.enable_cache(cached, "ram", 0, torch.device("cpu"))
    return {
        "course's way": plain(StepByStep(COURSE[split]), CourseImages),
        "ours, step by step": plain(StepByStep(OURS[split])),
        "ours, fused": plain(Compose(OURS[split])),
        "ours, fused, reproducible": training_batches(subset(Compose(OURS[split])), BATCH, 2024, 0),
        "ours, from the cache": training_batches(cached, BATCH, 2024, 0),
    }


def turn(loader: DataLoader, trains: bool) -> Work:
    """A pass over all batches; in a process that trains, memory is treated as the trainer does."""
    if trains:
        DeviceContext(torch.device("cpu"))

    def work() -> None:
        for _ in loader:
            pass

    return work


def measure(ways: dict[str, DataLoader], rounds: int) -> dict[str, list[float]]:
    """Images per second of CPU time, of each way in each round."""
    turns = {
        n: partial(turn, loader, isinstance(loader, SeededLoader)) for n, loader in ways.items()
    }
    return {
        name: [len(ways[name]) * BATCH / seconds for seconds in values]
        for name, values in cpu_seconds(turns, rounds).items()
    }


def summary(speeds: dict[str, list[float]]) -> list[dict]:
    """One row a way: its median, and the median of its ratio to the first way in each round."""
    base = next(iter(speeds.values()))
    return [
        {
            "way": name,
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
    lines = [
        "# Input: from JPEG to collated batches, one core",
        "",
        f"{told(result)} Medians of interleaved rounds; the ratio is taken within each round.",
        "",
        "| split | way | images / CPU second | µs / image | ratio |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {split} | {row['way']} | {row['images_per_cpu_second']:.0f} | "
        f"{row['microseconds_per_image']:.0f} | {row['ratio']:.2f} |"
        for split in ("train", "val")
        for row in result[split]
    ]
    return "\n".join(lines) + "\n"


def plot(result: dict, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), sharey=True, layout="constrained")
    for axis, split in zip(axes, ("train", "val"), strict=True):
        rows = result[split][::-1]
        speeds = [row["images_per_cpu_second"] for row in rows]
        bars = axis.barh([row["way"] for row in rows], speeds, color="#4477aa")
        axis.bar_label(bars, [f" {row['ratio']:.1f} ×" for row in rows])
        axis.set(title=split, xlabel="images per CPU second", xlim=(0, max(speeds) * 1.2))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the input path on one core.")
    parser.add_argument("data", type=Path, help="data folder in the MiniPlaces layout")
    parser.add_argument("--images", type=int, default=500, help="images a pass")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = {"opencv": cv2.__version__, "numpy": np.__version__}
    result = circumstances(f"{processor()}, one thread", **versions)
    for split in ("train", "val"):
        result[split] = summary(measure(loaders(args.data, split, args.images), args.rounds))
    target = ROOT / "results" / "input_benchmark"
    target.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    target.with_suffix(".md").write_text(table(result), encoding="utf-8")
    plot(result, target.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
