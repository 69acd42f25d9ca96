"""Diagnostics of an attack: signs that it overestimates the robustness of a network.

After the flags of AutoAttack (Croce & Hein, 2020; flags_doc.md of its repository). A failed
diagnostic means that the attack was probably too weak: the true robust accuracy is lower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deepvision.attacks.accuracy import accuracy_under_attack
from deepvision.attacks.norms import random_start
from deepvision.attacks.pgd import PGD, Attack, Model, frozen_eval_mode
from deepvision.attacks.square import Square

LARGE = 16  # times ε: no network of today withstands it
SLACK = 1.0  # percentage points that two accuracies on the same images may differ by


@dataclass(frozen=True)
class Diagnostic:
    """One check of an attack: the value measured, in per cent, and whether the check failed."""

    name: str
    value: float
    failed: bool
    finding: str

    def line(self) -> str:
        """The diagnostic as one line of text."""
        return f"{'WARNING' if self.failed else 'ok':>7}  {self.name}: {self.finding}"

    def record(self) -> dict:
        """The diagnostic as it is stored in evaluations.jsonl, under the keys of old records."""
        fields = {"name": self.name, "value": self.value, "finding": self.finding}
        return fields | {"warns": self.failed}


def run_diagnostics(model: Model, x: Tensor, y: Tensor, attack: PGD) -> Iterator[Diagnostic]:
    """Six diagnostics of `attack` on images x (N, C, H, W) with labels y (N,)."""
    attacked = accuracy_under_attack(model, attack, x, y)

    share = 100 * zero_gradient_mask(model, x, y).float().mean().item()
    yield Diagnostic("gradients", share, share > 0, f"no gradient on {share:.0f} % of the images")
    with frozen_eval_mode(model), torch.no_grad():
        random = not torch.equal(model(x), model(x))
    found = "the same image twice gives " + ("two answers" if random else "the same answer")
    yield Diagnostic("randomness", 100.0 * random, random, found)

    more = replace(attack, steps=4 * attack.steps, early_stop=True)
    left = accuracy_under_attack(model, more, x, y)
    found = f"{left:.1f} left by {4 * attack.steps} steps, {attacked:.1f} by {attack.steps}"
    yield Diagnostic("more steps", left, left < attacked - SLACK, found)

    noise = accuracy_under_attack(model, None, add_random_noise(x, attack), y)
    found = f"{noise:.1f} left by random noise of the same size, {attacked:.1f} by the attack"
    yield Diagnostic("noise", noise, noise <= attacked + SLACK, found)

    large = replace(attack, epsilon=LARGE * attack.epsilon, step_size=None)
    left = accuracy_under_attack(model, large, x, y)
    found = f"{left:.1f} left at {LARGE} ε, where nothing should be"
    yield Diagnostic("large ε", left, left > SLACK, found)

    square = Square(norm=attack.norm, epsilon=attack.epsilon, pixels=attack.pixels)
    left = accuracy_under_attack(model, square, x, y)
    found = f"{left:.1f} left by Square with {square.steps} queries, {attacked:.1f} by the attack"
    yield Diagnostic("gradient-free search", left, left < attacked - SLACK, found)


def zero_gradient_mask(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Where (N,) the gradient of the cross-entropy is zero at every pixel of x (N, C, H, W)."""
    with frozen_eval_mode(model):
        x = x.detach().clone().requires_grad_(True)
        (g,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return g.flatten(1).abs().amax(1) == 0


def add_random_noise(x: Tensor, attack: Attack) -> Tensor:
    """x (N, C, ...) plus a perturbation drawn uniformly from the attack's ball."""
    lo, hi = attack.pixels.delta_bounds(x)
    delta = random_start(lo, hi, attack.norm, attack.epsilon, attack.generator)
    return x + delta / attack.pixels.scale(x)
