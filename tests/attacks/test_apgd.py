"""APGD: its checkpoints and its step size."""

from __future__ import annotations

import torch

from deepvision.attacks import APGD, InputScale
from deepvision.attacks.apgd import checkpoints
from deepvision.attacks.pgd import State


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


def test_the_multi_epsilon_schedule_shrinks_the_ball_and_keeps_the_sparsity():
    """Radii of the points it looks at, and that it continues from its sparse best point."""
    x, seen = torch.full((1, 3, 8, 8), 0.5), []

    def model(v):
        seen.append((v - x).abs().sum().item())
        return torch.stack([-(v[:, 0, 0, 0] - x[:, 0, 0, 0]), v.flatten(1).sum(1)], 1)

    pixels = InputScale("pixel", (0.0,) * 3, (1.0,) * 3)
    options = {"early_stop": False, "pixels": pixels, "generator": torch.Generator().manual_seed(0)}
    apgd = APGD(norm="l1", epsilon=2.0, steps=20, multi_epsilon=True, **options)
    apgd.perturb(model, x, torch.zeros(1, dtype=torch.long))
    stages = [seen[:7], seen[7:14], seen[14:]]  # steps of 6, 6, 8, and the last point of each
    for stage, radius in zip(stages, (6.0, 4.0, 2.0), strict=True):
        assert max(stage) <= radius * (1 + 1e-4) and max(stage) > 0.9 * radius
    assert len(seen) == 7 + 7 + 9


def test_a_sparse_start_changes_fewer_coordinates_than_a_dense_one():
    x = torch.zeros(2, 3, 8, 8)
    delta = torch.zeros_like(x)
    delta[0, 0, 0, :6], delta[1] = 0.1, 0.1
    f = torch.zeros(2)
    begun = APGD(norm="l1")._begin(State(x, f.long(), None, delta, x, x, f=f, g=x))
    assert begun.k.tolist() == [4, 192 // 5] and begun.l0.tolist() == [6, 192]
