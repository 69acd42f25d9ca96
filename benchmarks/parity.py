"""The assignment's attack beside torchattacks', on a trained network:

    python benchmarks/parity.py path/to/miniplaces10 logs/RUN [--images 300]

Writes a section of results/robustness.md: accuracy left, and the share of images that reach their
least likely label, both with 95 % intervals; then our attack with more steps, which tells whether
a low share is the attack's or the budget's. torchattacks is optional: pip install torchattacks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from results_file import provenance, write_section
from torch import Tensor, nn
from trained import best_network, interval, validation_images

from student_code import IMAGENET_MEAN, IMAGENET_STD, PGDAttack

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
EPSILON, STEP = 0.1, 0.01  # normalised units, the contract's
BATCH = 100


class OnPixels(nn.Module):
    """The network on pixels in [0, 1], as torchattacks wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model((pixels - MEAN) / STD)


def ours(model: nn.Module, steps: int, targeted: bool, epsilon: float = EPSILON) -> Callable:
    attack = PGDAttack(nn.CrossEntropyLoss(), steps, STEP, epsilon, targeted=targeted)
    return lambda x, y: attack.perturb(model, x, None if targeted else y)


def theirs(model: nn.Module, steps: int, targeted: bool) -> Callable | None:
    try:
        import torchattacks
    except ImportError:
        return None
    options = {"eps": EPSILON * STD, "alpha": STEP * STD, "steps": steps, "random_start": False}
    attack = torchattacks.PGD(OnPixels(model).eval(), **options)
    if targeted:
        attack.set_mode_targeted_least_likely(quiet=True)
    return lambda x, y: (attack((x * STD + MEAN).clamp(0, 1), y) - MEAN) / STD


def hits(model: nn.Module, perturb: Callable, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Per cent that keep their label, and per cent that reach the clean image's least likely."""
    kept = reached = 0
    for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        x_adv = perturb(images, labels)
        with torch.no_grad():
            target, label = model(images).argmin(1), model(x_adv).argmax(1)
        kept, reached = kept + (label == labels).sum(), reached + (label == target).sum()
    return 100 * kept.item() / len(y), 100 * reached.item() / len(y)


def rows(model: nn.Module):
    """(name, perturb) of each line of the table."""
    yield "none", lambda x, y: x
    for targeted in (True, False):
        goal = "least likely" if targeted else "untargeted"
        yield f"{goal}, 10 steps", ours(model, 10, targeted)
        if public := theirs(model, 10, targeted):
            yield f"{goal}, 10 steps, torchattacks", public
    for steps in (20, 40):
        yield f"least likely, {steps} steps", ours(model, steps, True)
    yield "least likely, 20 steps, ε = 0.2", ours(model, 20, True, 2 * EPSILON)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=300)
    args = parser.parse_args()
    name, model = best_network(args.run, args.data)
    x, y = validation_images(args.data, args.images)
    share = interval(len(y))
    lines = ["| attack | accuracy left | target reached |", "|---|---:|---:|"]
    for attack, perturb in rows(model):
        kept, reached = hits(model, perturb, x, y)
        lines.append(f"| {attack} | {share(kept)} | {share(reached)} |")
        print(lines[-1], flush=True)
    head = (
        f"{name}, on {len(y)} images of {args.data.name}; "
        f"steps of {STEP} in the l_inf ball of ε = {EPSILON}, normalised units; per cent."
    )
    text = "\n".join([head, "", *lines, "", provenance()])
    write_section("robustness.md", "The assignment's attack beside torchattacks'", text)


if __name__ == "__main__":
    main()
