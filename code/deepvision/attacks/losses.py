"""Losses that an attack maximises, and when it has succeeded. Needs torch only.

A loss takes logits (N, K), true labels y (N,) and target labels t (N,) or None, and returns (N,).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def cross_entropy(logits: Tensor, y: Tensor, t: Tensor | None) -> Tensor:
    """The cross-entropy of y, or minus that of the target."""
    if t is None:
        return F.cross_entropy(logits, y, reduction="none")
    return -F.cross_entropy(logits, t, reduction="none")


def margin(logits: Tensor, y: Tensor, t: Tensor | None) -> Tensor:
    """max_{i != y} z_i - z_y, or with a target z_t - max_{i != t} z_i; positive means success.

    Carlini & Wagner, 2017, section V-A, f_6 without its lower bound.
    """
    label = (y if t is None else t).unsqueeze(1)
    others = logits.scatter(1, label, -math.inf).amax(1)
    gap = others - logits.gather(1, label).squeeze(1)
    return gap if t is None else -gap


def dlr(logits: Tensor, y: Tensor, t: Tensor | None) -> Tensor:
    """Difference of logits ratio, invariant to shift and scale (Croce & Hein, 2020, eq. 6 and 7).

    Raises:
        ValueError: fewer than three classes, or with a target fewer than four.
    """
    if logits.shape[1] < (3 if t is None else 4):
        raise ValueError("dlr needs at least 3 classes, with a target 4: use margin instead")
    z = logits.topk(3 if t is None else 4, dim=1).values
    tiny = torch.finfo(logits.dtype).tiny
    if t is None:
        return margin(logits, y, None) / (z[:, 0] - z[:, 2] + tiny)
    gap = logits.gather(1, t[:, None]) - logits.gather(1, y[:, None])
    return gap.squeeze(1) / (z[:, 0] - (z[:, 2] + z[:, 3]) / 2 + tiny)


LOSSES = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def attack_succeeded(logits: Tensor, y: Tensor, t: Tensor | None) -> Tensor:
    """Where (N,) the prediction is not y, or with a target where it is t."""
    prediction = logits.argmax(1)
    return prediction != y if t is None else prediction == t
