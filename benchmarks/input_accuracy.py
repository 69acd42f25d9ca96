"""Compare the accuracy of networks trained with fused and with step-by-step augmentation.

    python benchmarks/input_accuracy.py path/to/miniplaces10 [--epochs 8] [--seeds 2]

Trains SimpleNet by main.py with both paths of `Compose`, from the same seeds. Writes
results/input_accuracy.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from results_file import RESULTS, origin, origin_line

import custom_transforms
import main as driver
from deepvision.config import OneLineParser
from deepvision.runtime.jsonl import read_metrics
from deepvision.runtime.provenance import command_line

PATHS = {"fused": custom_transforms.FUSED, "step by step": {}}
LAST = 3  # epochs whose mean is a run's accuracy


def train(path: str, seed: int, args: argparse.Namespace) -> list[float]:
    """Top-1 accuracy on the validation images after each epoch, in per cent."""
    custom_transforms.FUSED = PATHS[path]  # forked workers inherit it
    flags = [str(args.data), f"--epochs={args.epochs}", f"--seed={seed}", "-b=64", "--gpu=-1"]
    flags += ["-j=1", "--warmup=1", "--amp=bf16", "-p=50"]
    with tempfile.TemporaryDirectory() as logs:
        if code := driver.main(flags, logs=Path(logs)):
            sys.exit(code)
        (metrics,) = Path(logs).glob("*/metrics.jsonl")
        return [row["val_top1_accuracy"] for row in read_metrics(metrics)]


def main(argv: Sequence[str]) -> None:
    """Train all runs and write the table."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("data", type=Path, help="data folder in the MiniPlaces layout")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of each run")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each variant")
    args = parser.parse_args(argv[1:])
    source = origin_line(origin(command_line(argv)))
    lines = [
        f"| augmentation | seed | after each epoch | mean of the last {LAST} |",
        "|---|---:|---|---:|",
    ]
    for seed in range(args.seeds):
        for path in PATHS:
            top1 = train(path, seed, args)
            epochs = " ".join(f"{value:.1f}" for value in top1)
            lines.append(f"| {path} | {seed} | {epochs} | {statistics.mean(top1[-LAST:]):.1f} |")
            print(lines[-1], flush=True)
    head = f"# Accuracy of both input paths\n\n{source} SimpleNet, top-1 in per cent.\n\n"
    (RESULTS / "input_accuracy.md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv)
