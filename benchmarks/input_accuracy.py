"""Does a network learn as well from images augmented in one step as from those done step by step?

    python benchmarks/input_accuracy.py path/to/miniplaces10 [--epochs 8] [--seeds 2]

Trains SimpleNet by main.py on both of Compose's paths, for as many epochs and from the same seeds.
Writes results/input_accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from results_file import ROOT, provenance

sys.path.insert(0, str(ROOT / "code"))

import custom_transforms  # noqa: E402
import main  # noqa: E402
from deepvision.runtime import run_logger  # noqa: E402

PATHS = {"fused": custom_transforms.FUSED, "step by step": {}}
LAST = 3  # epochs whose mean is a run's accuracy


def train(path: str, seed: int, args: argparse.Namespace) -> list[float]:
    """Top-1 on the validation images after each epoch, in per cent."""
    custom_transforms.FUSED = PATHS[path]  # the workers are forked: they see it, too
    words = [str(args.data), f"--epochs={args.epochs}", f"--seed={seed}", "-b=64", "--gpu=-1"]
    with tempfile.TemporaryDirectory() as folder:
        run_logger.LOGS = Path(folder)
        if code := main.main([*words, "-j=1", "--warmup=1", "--amp=bf16", "-p=50"]):
            sys.exit(code)
        (metrics,) = Path(folder).glob("*/metrics.jsonl")
        return [json.loads(line)["val_top1_accuracy"] for line in metrics.open()]


def benchmark() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    made = provenance()
    lines = [
        "| augmentation | seed | after each epoch | mean of the last 3 |",
        "|---|---:|---|---:|",
    ]
    for seed in range(args.seeds):
        for path in PATHS:
            top1 = train(path, seed, args)
            every = " ".join(f"{value:.1f}" for value in top1)
            lines.append(f"| {path} | {seed} | {every} | {statistics.mean(top1[-LAST:]):.1f} |")
            print(lines[-1], flush=True)
    text = f"# Accuracy of both input paths\n\n{made} SimpleNet, top-1 in per cent.\n\n"
    target = ROOT / "results" / "input_accuracy.md"
    target.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    benchmark()
