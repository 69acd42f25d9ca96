"""What a number under attack is worth: its budget in words, health lights, accuracy over a grid.

The lights are after AutoAttack's flags (Croce & Hein, 2020; flags_doc.md of its repository): an
attack that one of them warns of was too weak for this network, so the true number is lower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvision.attacks.norms import random_start
from deepvision.attacks.pgd import PGD, Attack, frozen_eval_mode
from deepvision.attacks.square import Square

EPSILONS = {"linf": 4, "l2": 512, "l1": 10240}  # of 255; in l_2 that is 2, in l_1 40, of [0, 1]
FACTORS = (1, 2, 4, 8, 16)  # quarters of it are the grid's ε: whole numbers, as curves need
STEPS = (1, 2, 5, 10, 20, 50)  # of the grid
LARGE = 16  # times ε: more than any network of today withstands
SLACK = 1.0  # percentage points that two accuracies on the same images may differ by


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of n, in per cent (Wilson, 1927)."""
    share, centre = hits / n, (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * share * (1 - share) + z * z / 4)
    return max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))


def budget(norm: str, epsilon: float, std: Sequence[float]) -> str:
    """ε of 255 in words, in pixels and in the network's normalised input."""
    if norm == "linf":
        normalised = ", ".join(f"{epsilon / 255 / s:.3f}" for s in std)
        return f"l_inf, ε = {epsilon:g}/255 = ({normalised}) normalised in R, G, B"
    return f"l_{norm[1]}, ε = {epsilon:g}/255 = {epsilon / 255:.3g} in pixels of [0, 1]"


def describe(attack: PGD) -> str:
    words = [f"{attack.goal.replace('_', ' ')} PGD, {attack.steps} steps"]
    if attack.steps:
        words.append(f"of {attack.base_step():.4g}/255")
    if attack.restarts > 1:
        words.append(f"with {attack.restarts} restarts")
    return f"{' '.join(words)}, {budget(attack.norm, attack.epsilon, attack.pixels.std)}"


# ---------------------------------------------------------------------------------------------
# Health lights
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnostic:
    """One doubt about an attack: what was measured, in per cent, and whether it warns."""

    name: str
    value: float
    warns: bool
    finding: str

    def line(self) -> str:
        return f"{'WARNING' if self.warns else 'ok':>7}  {self.name}: {self.finding}"


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with frozen_eval_mode(model), torch.no_grad():
        return 100 * (model(x).argmax(1) == y).float().mean().item()


def run_diagnostics(model: nn.Module, x: Tensor, y: Tensor, attack: PGD) -> Iterator[Diagnostic]:
    """Six lights for `attack`, on images x (N, C, H, W) with labels y (N,)."""
    attacked = accuracy(model, attack.perturb(model, x, y), y)

    def left_by(other: Attack) -> float:
        return accuracy(model, other.perturb(model, x, y), y)

    share = 100 * zero_gradient_mask(model, x, y).float().mean().item()
    yield Diagnostic("gradients", share, share > 0, f"no gradient on {share:.0f} % of the images")
    with frozen_eval_mode(model), torch.no_grad():
        random = not torch.equal(model(x), model(x))
    found = "the same image twice gives " + ("two answers" if random else "the same answer")
    yield Diagnostic("randomness", 100.0 * random, random, found)

    more = left_by(replace(attack, steps=4 * attack.steps, early_stop=True))
    found = f"{more:.1f} left by {4 * attack.steps} steps, {attacked:.1f} by {attack.steps}"
    yield Diagnostic("more steps", more, more < attacked - SLACK, found)

    noise = accuracy(model, add_random_noise(x, attack), y)
    found = f"{noise:.1f} left by random noise of the same size, {attacked:.1f} by the attack"
    yield Diagnostic("noise", noise, noise <= attacked + SLACK, found)

    large = left_by(replace(attack, epsilon=LARGE * attack.epsilon, step_size=None))
    found = f"{large:.1f} left at {LARGE} ε, where nothing should be"
    yield Diagnostic("large ε", large, large > SLACK, found)

    square = Square(norm=attack.norm, epsilon=attack.epsilon, pixels=attack.pixels)
    free = left_by(square)
    found = f"{free:.1f} left by Square with {square.steps} queries, {attacked:.1f} by the attack"
    yield Diagnostic("gradient-free search", free, free < attacked - SLACK, found)


def zero_gradient_mask(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which images (N,) the loss has no gradient on at all."""
    with frozen_eval_mode(model):
        x = x.detach().clone().requires_grad_(True)
        (g,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return g.flatten(1).abs().amax(1) == 0


def add_random_noise(x: Tensor, attack: Attack) -> Tensor:
    """x with a perturbation drawn from the attack's ball."""
    lo, hi = attack.pixels.delta_bounds(x)
    delta = random_start(lo, hi, attack.norm, attack.epsilon, attack.generator)
    return x + delta / attack.pixels.scale(x)


# ---------------------------------------------------------------------------------------------
# Accuracy over ε and steps
# ---------------------------------------------------------------------------------------------


def sweep(model: nn.Module, x: Tensor, y: Tensor, attack: PGD) -> Iterator[tuple[int, int, float]]:
    """(ε of 255, steps, accuracy in per cent), ε = 0 first, then every pair; the same images.

    The size of a step follows from ε and their number, if `attack` does not give it.
    """
    yield 0, 0, accuracy(model, x, y)
    for factor in FACTORS:
        epsilon = factor * EPSILONS[attack.norm] // 4
        for steps in STEPS:
            pair = replace(attack, epsilon=epsilon, steps=steps, early_stop=True)
            yield epsilon, steps, accuracy(model, pair.perturb(model, x, y), y)


def table(norm: str, points: list[tuple[int, int, float]], n: int) -> str:
    """The sweep in Markdown, a row for each ε."""
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
