"""Accuracy of a network, clean or under an attack: one function for the whole project."""

from __future__ import annotations

import torch
from torch import Tensor

from deepvision.attacks.pgd import Attack, Model, frozen_eval_mode


def correct_under_attack(model: Model, attack: Attack | None, x: Tensor, y: Tensor) -> Tensor:
    """Where (N,) the prediction for x (N, C, H, W), attacked first, is y; None: no attack.

    Raises:
        ValueError: x is empty.
    """
    if len(x) == 0:
        raise ValueError("there are no images to measure the accuracy on")
    if attack is not None:
        x = attack.perturb(model, x, y)
    with frozen_eval_mode(model), torch.no_grad():
        return model(x).argmax(1) == y


def accuracy_under_attack(model: Model, attack: Attack | None, x: Tensor, y: Tensor) -> float:
    """The accuracy on x (N, C, H, W) with labels y (N,) under the attack, in per cent."""
    return 100 * correct_under_attack(model, attack, x, y).float().mean().item()
