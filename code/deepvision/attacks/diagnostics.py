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

from deepvision.attacks.accuracy import accuracy_under_attack, correct_under_attack
from deepvision.attacks.autoattack import other_labels
from deepvision.attacks.norms import random_start
from deepvision.attacks.pgd import PGD, Attack, Model, frozen_eval_mode, is_randomised
from deepvision.attacks.square import Square

LARGE = 16  # times ε: no network of today withstands it
SLACK = 1.0  # percentage points that two accuracies on the same images may differ by
TARGETS = 3  # labels that targeted attacks aim at

# What to run next where a diagnostic fails
STANDARD = "--attack-suite=standard"
RAND = "--attack-suite=rand, which averages gradients over 20 draws"
DLR = "--attack-loss=dlr, whose gradient does not vanish where the softmax saturates"
MEAN_AND_STD = "the mean and std that the inputs were normalised with"


@dataclass(frozen=True)
class Diagnostic:
    """One check of an attack: the value measured, in per cent, and whether the check failed.

    advice: what to run next if it failed.
    """

    name: str
    value: float
    failed: bool
    finding: str
    advice: str

    def line(self) -> str:
        """The diagnostic as one line of text."""
        if not self.failed:
            return f"     ok  {self.name}: {self.finding}"
        return f"WARNING  {self.name}: {self.finding}; next: {self.advice}"

    def record(self) -> dict:
        """The diagnostic as it is stored in evaluations.jsonl, under the keys of old records."""
        fields = {"name": self.name, "value": self.value, "finding": self.finding}
        return fields | {"warns": self.failed}


def run_diagnostics(model: Model, x: Tensor, y: Tensor, attack: PGD) -> Iterator[Diagnostic]:
    """Nine diagnostics of `attack` on images x (N, C, H, W) with labels y (N,).

    Raises:
        ValueError: x is empty.
    """
    attacked = accuracy_under_attack(model, attack, x, y)
    yield from diagnose_network(model, x, y, attack)
    yield from diagnose_strength(model, x, y, attack, attacked)


def diagnose_network(model: Model, x: Tensor, y: Tensor, attack: PGD) -> Iterator[Diagnostic]:
    """Whether inputs, gradients and outputs are such that a gradient attack can work."""
    misfit = attack.pixels.misfit(x)
    found = misfit or "the inputs are images under the stated mean and std"
    yield Diagnostic("pixel range", 100.0 * bool(misfit), bool(misfit), found, MEAN_AND_STD)

    share = 100 * zero_gradient_mask(model, x, y).float().mean().item()
    found = f"no gradient on {share:.0f} % of the images"
    yield Diagnostic("gradients", share, share > 0, found, f"{DLR}, or {STANDARD}")

    random = is_randomised(model, x)
    found = "the same image twice gives " + ("two answers" if random else "the same answer")
    yield Diagnostic("randomness", 100.0 * random, random, found, RAND)


def diagnose_strength(
    model: Model, x: Tensor, y: Tensor, attack: PGD, attacked: float
) -> Iterator[Diagnostic]:
    """Whether other attacks are stronger than `attack`, which leaves `attacked` per cent."""

    def left_by(other: Attack) -> float:
        return accuracy_under_attack(model, other, x, y)

    with frozen_eval_mode(model), torch.no_grad():
        logits = model(x)
    steps = 4 * attack.steps
    left = left_by(replace(attack, steps=steps, early_stop=True))
    found = f"{left:.1f} left by {steps} steps, {attacked:.1f} by {attack.steps}"
    yield Diagnostic("more steps", left, left < attacked - SLACK, found, f"--attack-steps={steps}")

    noise = accuracy_under_attack(model, None, add_random_noise(x, attack), y)
    found = f"{noise:.1f} left by random noise of the same size, {attacked:.1f} by the attack"
    yield Diagnostic("noise", noise, noise <= attacked + SLACK, found, STANDARD)

    losses = other_losses(attack, logits.shape[1])
    left, name = min((left_by(replace(attack, loss=loss)), loss) for loss in losses)
    found = f"{left:.1f} left by the loss {name}, {attacked:.1f} by the attack"
    yield Diagnostic("loss", left, left < attacked - SLACK, found, f"--attack-loss={name}")

    left = 100 * robust_to_targets(model, x, y, attack, logits).float().mean().item()
    found = f"{left:.1f} left by attacks towards {TARGETS} targets, {attacked:.1f} by the attack"
    yield Diagnostic("targets", left, left < attacked - SLACK, found, STANDARD)

    epsilon = min(LARGE * attack.epsilon, attack.pixels.box_radius(x, attack.norm))
    left = left_by(replace(attack, epsilon=epsilon, step_size=None))
    found = f"{left:.1f} left at ε = {epsilon:g}, where nothing should be"
    yield Diagnostic("large ε", left, left > SLACK, found, STANDARD)

    square = Square(norm=attack.norm, epsilon=attack.epsilon, pixels=attack.pixels)
    left = left_by(square)
    found = f"{left:.1f} left by Square with {square.steps} queries, {attacked:.1f} by the attack"
    yield Diagnostic("gradient-free search", left, left < attacked - SLACK, found, STANDARD)


def other_losses(attack: PGD, num_classes: int) -> list[str]:
    """The losses to compare an attack's with."""
    losses = ("ce", "margin", "dlr") if num_classes > 3 else ("ce", "margin")
    return [loss for loss in losses if loss != attack.loss]


def robust_to_targets(model: Model, x: Tensor, y: Tensor, attack: PGD, logits: Tensor) -> Tensor:
    """Where (N,) the prediction stays y under attacks towards each of the likeliest labels.

    logits: the model's, of x (N, C, ...).
    """
    robust = logits.argmax(1) == y
    targeted = replace(attack, goal="towards_target", loss="margin")
    for target in other_labels(logits, y)[:, :TARGETS].T:
        x_adv = targeted.perturb(model, x, y, target)
        robust &= correct_under_attack(model, None, x_adv, y)
    return robust


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
