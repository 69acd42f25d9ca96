"""Losses against their definitions."""

from __future__ import annotations

import pytest
import torch
from attack_toys import seeded

from deepvision.attacks import LOSSES, attack_succeeded


def test_losses_are_their_definitions():
    logits = torch.randn(40, 6, generator=seeded(), dtype=torch.float64)
    y = torch.arange(40) % 6
    t = (y + 1 + torch.arange(40) % 5) % 6
    for n in range(40):
        z, i, j = logits[n], int(y[n]), int(t[n])
        down = sorted(z.tolist(), reverse=True)
        best_but = [max(v for k, v in enumerate(z.tolist()) if k != label) for label in (i, j)]
        expected = {
            ("ce", False): z.exp().sum().log() - z[i],
            ("ce", True): z[j] - z.exp().sum().log(),
            ("margin", False): best_but[0] - z[i],
            ("margin", True): z[j] - best_but[1],
            ("dlr", False): -(z[i] - best_but[0]) / (down[0] - down[2]),
            ("dlr", True): -(z[i] - z[j]) / (down[0] - (down[2] + down[3]) / 2),
        }
        for (name, targeted), value in expected.items():
            got = LOSSES[name](logits, y, t if targeted else None)[n].item()
            assert got == pytest.approx(float(value), abs=1e-9), (name, targeted)


def test_dlr_is_blind_to_scale_and_wants_enough_classes():
    logits, y = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 5
    dlr = LOSSES["dlr"]
    for t in (None, (y + 1) % 5):
        torch.testing.assert_close(dlr(1000 * logits + 3, y, t), dlr(logits, y, t))
    with pytest.raises(ValueError, match="at least 3"):
        dlr(logits[:, :2], y % 2, None)


def test_a_positive_margin_is_success():
    logits, y, t = torch.randn(200, 5), torch.arange(200) % 5, torch.arange(200) // 3 % 5
    for target in (None, t):
        assert torch.equal(
            LOSSES["margin"](logits, y, target) > 0, attack_succeeded(logits, y, target)
        )
