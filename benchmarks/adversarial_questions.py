"""Compare settings of adversarial training: with which of them does the network still learn?

    python benchmarks/adversarial_questions.py path/to/cifar10 [--images 8000] [--epochs 6]

Trains SimpleNet from scratch once per setting, on 32 x 32 images. Writes a section of
results/robustness.md: clean accuracy and accuracy under PGD-10, with 95 % confidence intervals.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from results_file import origin, origin_line, write_section
from small_images import BATCH, SCALE, load, train
from trained import confidence_interval

from deepvision.attacks import PGD, accuracy_under_attack
from deepvision.config import OneLineParser
from deepvision.runtime.provenance import command_line
from deepvision.training.objectives import AdversarialTraining, Standard

EPSILON = 4.0  # 8-bit intensity levels
SMALL = 0.01 * 255 * sum(SCALE.std) / 3  # 0.01 in the assignment's normalised units
# Changes to the default: PGD-3 on every batch, epsilon warms up over the middle half of the run
SETTINGS = {
    "no adversarial training": None,
    "default": {},
    "full ε from the first step": {"eps_warmup": (0, 1)},
    "num_steps = 0": {"steps": 0},
    "ε = 0": {"epsilon": 0.0},
    "ε = 0.01 normalised": {"epsilon": SMALL},
    "5 % of the batches": {"attack_prob": 0.05},
    "50 % of the batches": {"attack_prob": 0.5},
    "mean of clean and attacked image": {"clean_mix": 0.5},
}


def main(argv: Sequence[str]) -> None:
    """Train and attack one network per setting; write the section after each."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train/CLASS/ and test/CLASS/")
    parser.add_argument("--images", type=int, default=8000, help="training images")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each training")
    args = parser.parse_args(argv[1:])
    torch.manual_seed(0)
    train_set, (x, y) = load(args.data / "train", args.images), load(args.data / "test", 1000)
    steps = args.epochs * (args.images // BATCH)
    default = {"epsilon": EPSILON, "scale": SCALE, "eps_warmup": (steps // 4, 3 * steps // 4)}
    attack = PGD(epsilon=EPSILON, pixels=SCALE, early_stop=True)
    head = (
        f"SimpleNet from scratch on {args.images} images of 32 x 32 ({args.data.name}), "
        f"{args.epochs} epochs, one run per setting; {len(y)} test images, 95 % intervals "
        "(Wilson); chance 10 %."
    )
    lines = [head, "", "| training | clean | PGD-10, 4/255 |", "|---|---:|---:|"]
    source = origin_line(origin(command_line(argv)))
    for name, change in SETTINGS.items():
        objective = Standard() if change is None else AdversarialTraining(**default | change)
        model = train(objective, *train_set, args.epochs, seed=0)
        accuracies = (
            accuracy_under_attack(model, None, images, y)
            for images in (x, attack.perturb(model, x, y))
        )
        lines.append(f"| {name} | {' | '.join(map(confidence_interval(len(y)), accuracies))} |")
        print(lines[-1], flush=True)
        text = "\n".join([*lines, "", source])
        write_section("robustness.md", "Settings of adversarial training", text)


if __name__ == "__main__":
    main(sys.argv)
