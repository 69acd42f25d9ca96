"""Accuracy under PGD over a grid of ε and steps, and attacks described as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from deepvision.attacks import EPSILONS, PGD, accuracy_under_attack
from deepvision.attacks.pgd import Model
from deepvision.evaluation.statistics import wilson

FACTORS = (1, 2, 4, 8, 16)  # of the grid: quarters of the default ε, as curves need integers
STEPS = (1, 2, 5, 10, 20, 50)  # of the grid

Point = tuple[int, int, float]  # ε of 255, steps, accuracy in per cent


def sweep(model: Model, x: Tensor, y: Tensor, attack: PGD) -> Iterator[Point]:
    """The points of the grid on images x (N, C, H, W) with labels y (N,); ε = 0 comes first.

    Unless `attack` has a step size, it follows from ε and the number of steps.
    """
    yield 0, 0, accuracy_under_attack(model, None, x, y)
    for factor in FACTORS:
        epsilon = factor * EPSILONS[attack.norm] // 4
        for steps in STEPS:
            pair = replace(attack, epsilon=epsilon, steps=steps, early_stop=True)
            yield epsilon, steps, accuracy_under_attack(model, pair, x, y)


def format_table(norm: str, points: list[Point], n: int) -> str:
    """The points of a sweep on n images as a Markdown table with one row per ε."""
    clean, rest = points[0][2], {(epsilon, steps): a for epsilon, steps, a in points[1:]}
    lines = [
        f"Accuracy in per cent under PGD in l_{norm.removeprefix('l')}, {n} images (each ± "
        f"{(wilson(n / 2, n)[1] - 50):.0f} at most, 95 %); without an attack {clean:.1f}.",
        "",
        "| ε / 255 | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |",
        "|---:|" + "---:|" * len(STEPS),
    ]
    for epsilon in dict.fromkeys(epsilon for epsilon, _ in rest):
        row = " | ".join(f"{rest[epsilon, steps]:.1f}" for steps in STEPS)
        lines.append(f"| {epsilon:g} | {row} |")
    return "\n".join(lines)


def format_budget(norm: str, epsilon: float, std: Sequence[float]) -> str:
    """ε of 255 as text: in pixels and, for l_inf, in the network's normalised input."""
    if norm == "linf":
        normalised = ", ".join(f"{epsilon / 255 / s:.3f}" for s in std)
        return f"l_inf, ε = {epsilon:g}/255 = ({normalised}) normalised in R, G, B"
    return f"l_{norm[1]}, ε = {epsilon:g}/255 = {epsilon / 255:.3g} in pixels of [0, 1]"


def describe(attack: PGD) -> str:
    """The attack as text: goal, steps, step size, restarts and budget (unit "255")."""
    words = [f"{attack.goal.replace('_', ' ')} PGD, {attack.steps} steps"]
    if attack.steps:
        words.append(f"of {attack.base_step():.4g}/255")
    if attack.restarts > 1:
        words.append(f"with {attack.restarts} restarts")
    return f"{' '.join(words)}, {format_budget(attack.norm, attack.epsilon, attack.pixels.std)}"
