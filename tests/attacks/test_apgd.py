"""APGD: its checkpoints and its step size."""

from __future__ import annotations

import torch

from deepvision.attacks import APGD, InputScale
from deepvision.attacks.apgd import checkpoints


def test_checkpoints_are_the_papers():
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [0, 1]


def test_apgd_takes_smaller_steps_when_the_loss_stalls():
    """On -|x - peak| steps of 2 epsilon always overshoot; halved ones end near every peak."""
    x, peak = torch.zeros(9, 1, 1, 1), torch.linspace(-0.8, 0.8, 9)

    def loss(logits, y, t):
        return -(logits[:, 0] - peak).abs()

    options = {"pixels": InputScale("normalised", (0.5,), (0.5,)), "random_start": False}
    apgd = APGD(epsilon=0.9, steps=40, loss=loss, early_stop=False, **options)
    found = apgd.perturb(lambda x: x.flatten(1), x, torch.zeros(9, dtype=torch.long))
    assert (found.flatten() - peak).abs().max() < 0.03
