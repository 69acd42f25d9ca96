"""The sweep is the attack at each pair of ε and steps; attacks as text."""

from __future__ import annotations

import pytest
from diagnosed import STD, Healthy, images, pgd

from deepvision.attacks import accuracy_under_attack
from deepvision.evaluation import sweep as grid
from deepvision.evaluation.sweep import describe, format_budget, format_table, sweep


@pytest.fixture(scope="module")
def data():
    return images()


def test_budgets_in_both_units():
    words = format_budget("linf", 8, (0.229, 0.224, 0.225))
    assert words == "l_inf, ε = 8/255 = (0.137, 0.140, 0.139) normalised in R, G, B"
    assert format_budget("l2", 512, STD.flatten()) == "l_2, ε = 512/255 = 2.01 in pixels of [0, 1]"
    assert describe(pgd(steps=0)).startswith("untargeted PGD, 0 steps, l_inf")


def test_a_sweep_is_the_attack_at_each_pair(data, monkeypatch):
    monkeypatch.setattr(grid, "STEPS", (1, 5))
    monkeypatch.setattr(grid, "FACTORS", (4, 16))
    model, (x, y) = Healthy(), data
    points = list(sweep(model, x, y, pgd()))
    expected = [(0, 0, accuracy_under_attack(model, None, x, y))]
    for epsilon in (4, 16):
        for steps in (1, 5):
            x_adv = pgd(epsilon=epsilon, steps=steps).perturb(model, x, y)
            expected.append((epsilon, steps, accuracy_under_attack(model, None, x_adv, y)))
    assert [p[:2] for p in points] == [p[:2] for p in expected]
    assert [p[2] for p in points] == pytest.approx([p[2] for p in expected])
    lines = format_table("linf", points, len(y)).splitlines()
    assert lines[2] == "| ε / 255 | 1 steps | 5 steps |"
    assert lines[4] == f"| 4 | {points[1][2]:.1f} | {points[2][2]:.1f} |"
