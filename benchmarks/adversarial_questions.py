"""Does the network still learn? What students ask of adversarial training, as one table:

    python benchmarks/adversarial_questions.py path/to/cifar10 [--images 8000] [--epochs 6]

Trains SimpleNet from scratch once for each question, on 32 x 32 images, and writes a section of
results/robustness.md: clean accuracy and accuracy under PGD-10, with 95 % intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from results_file import provenance, write_section
from small_images import BATCH, PIXELS, load, train
from trained import interval

from deepvision.attacks import PGD, accuracy_under_attack
from deepvision.training.objectives import AdversarialTraining, standard

EPSILON = 4.0  # of 255
TINY = 0.01 * 255 * sum(PIXELS.std) / 3  # 0.01 in the assignment's normalised units
QUESTIONS = {  # what differs from the recipe: every batch, PGD-3, a clean quarter, ε full at 3/4
    "no adversarial training": None,
    "the recipe": {},
    "full ε from the first step": {"ramp": (0, 1)},
    "num_steps = 0": {"steps": 0},
    "ε = 0": {"epsilon": 0.0},
    "ε = 0.01 normalised": {"epsilon": TINY},
    "5 % of the batches": {"prob": 0.05},
    "50 % of the batches": {"prob": 0.5},
    "half clean, half attacked pixels": {"blend": 0.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="holds train/CLASS/ and test/CLASS/")
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    train_set, (x, y) = load(args.data / "train", args.images), load(args.data / "test", 1000)
    steps = args.epochs * (args.images // BATCH)
    recipe = {"epsilon": EPSILON, "pixels": PIXELS, "ramp": (steps // 4, 3 * steps // 4)}
    attack = PGD(epsilon=EPSILON, pixels=PIXELS, early_stop=True)
    head = (
        f"SimpleNet from scratch on {args.images} images of 32 x 32 ({args.data.name}), "
        f"{args.epochs} epochs, one run each; {len(y)} test images, 95 % intervals (Wilson); "
        "chance 10 %."
    )
    lines = [head, "", "| training | clean | PGD-10, 4/255 |", "|---|---:|---:|"]
    for name, change in QUESTIONS.items():
        objective = standard if change is None else AdversarialTraining(**recipe | change)
        model = train(objective, *train_set, args.epochs, seed=0)
        found = (accuracy_under_attack(model, a, x, y) for a in (None, attack))
        lines.append(f"| {name} | {' | '.join(map(interval(len(y)), found))} |")
        print(lines[-1], flush=True)
        text = "\n".join([*lines, "", provenance()])  # after each row: all of them take a while
        write_section("robustness.md", "Does the network still learn?", text)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
