"""Compare the assignment's attack with torchattacks' PGD, on a trained network.

    python benchmarks/parity.py path/to/miniplaces10 logs/RUN [--images 300]

Writes a section of results/robustness.md: robust accuracy, and the rate of images that reach their
least likely class, both with 95 % confidence intervals. More steps of our attack show whether a low
rate is due to the attack or to its budget. torchattacks is optional: pip install torchattacks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from results_file import origin, origin_line, write_section
from torch import Tensor, nn
from trained import best_network, confidence_interval, validation_images

from deepvision.config import OneLineParser
from deepvision.runtime.provenance import command_line
from student_code import IMAGENET_MEAN, IMAGENET_STD, PGDAttack

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
EPSILON, STEP_SIZE = 0.1, 0.01  # normalised units, as in the assignment
BATCH = 100

Perturb = Callable[[Tensor, Tensor], Tensor]  # images, labels -> attacked images, all normalised


class PixelInput(nn.Module):
    """The network on pixels in [0, 1], which torchattacks requires."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [0, 1] -> logits (N, K)."""
        return self.model((pixels - MEAN) / STD)


def our_pgd(model: nn.Module, steps: int, targeted: bool, epsilon: float = EPSILON) -> Perturb:
    """The assignment's attack; targeted: at the least likely class."""
    attack = PGDAttack(nn.CrossEntropyLoss(), steps, STEP_SIZE, epsilon, targeted=targeted)
    return lambda x, y: attack.perturb(model, x, None if targeted else y)


def torchattacks_pgd(model: nn.Module, steps: int, targeted: bool) -> Perturb | None:
    """The same attack by torchattacks; None where it is not installed."""
    try:
        import torchattacks
    except ImportError:
        return None
    budget = {"eps": EPSILON * STD, "alpha": STEP_SIZE * STD}
    attack = torchattacks.PGD(PixelInput(model).eval(), **budget, steps=steps, random_start=False)
    if targeted:
        attack.set_mode_targeted_least_likely(quiet=True)
    return lambda x, y: (attack((x * STD + MEAN).clamp(0, 1), y) - MEAN) / STD


def success_rates(model: nn.Module, perturb: Perturb, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Per cent classified correctly; per cent that reach the clean image's least likely class."""
    correct = reached = 0
    for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        x_adv = perturb(images, labels)
        with torch.no_grad():
            target, prediction = model(images).argmin(1), model(x_adv).argmax(1)
        correct += (prediction == labels).sum().item()
        reached += (prediction == target).sum().item()
    return 100 * correct / len(y), 100 * reached / len(y)


def attacks(model: nn.Module) -> Iterator[tuple[str, Perturb]]:
    """The attacks by name."""
    yield "none", lambda x, y: x
    for targeted in (True, False):
        goal = "least likely" if targeted else "untargeted"
        yield f"{goal}, 10 steps", our_pgd(model, 10, targeted)
        if library := torchattacks_pgd(model, 10, targeted):
            yield f"{goal}, 10 steps, torchattacks", library
    for steps in (20, 40):
        yield f"least likely, {steps} steps", our_pgd(model, steps, True)
    yield "least likely, 20 steps, ε = 0.2", our_pgd(model, 20, True, 2 * EPSILON)


def main(argv: Sequence[str]) -> None:
    """Attack and write the section."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("data", type=Path, help="data folder in the MiniPlaces layout")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--images", type=int, default=300, help="validation images")
    args = parser.parse_args(argv[1:])
    name, model = best_network(args.run, args.data)
    x, y = validation_images(args.data, args.images)
    interval = confidence_interval(len(y))
    lines = ["| attack | accuracy | target reached |", "|---|---:|---:|"]
    for attack, perturb in attacks(model):
        correct, reached = success_rates(model, perturb, x, y)
        lines.append(f"| {attack} | {interval(correct)} | {interval(reached)} |")
        print(lines[-1], flush=True)
    head = (
        f"{name}, on {len(y)} images of {args.data.name}; "
        f"steps of {STEP_SIZE} in the l_inf ball of ε = {EPSILON}, normalised units; per cent."
    )
    text = "\n".join([head, "", *lines, "", origin_line(origin(command_line(argv)))])
    write_section("robustness.md", "The assignment's attack and torchattacks'", text)


if __name__ == "__main__":
    main(sys.argv)
