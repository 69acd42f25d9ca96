"""Attacks of public libraries are not stronger."""

from __future__ import annotations

import pytest
from attack_toys import MEAN, RADIUS, STD, accuracy, batch, make
from torch import nn

from deepvision.attacks import APGD, PGD


@pytest.mark.parametrize("name", ["PGD", "PGDL2", "APGD", "APGD-L2"])
def test_torchattacks_is_not_stronger(name, net):
    theirs = pytest.importorskip("torchattacks", reason="torchattacks is an optional dependency")
    x, y = batch(256, 2000)
    norm = "l2" if name.endswith("L2") else "linf"
    model = nn.Sequential(Normalise(), net).eval()
    epsilon, step = RADIUS[norm], 2.5 * RADIUS[norm] / 20
    public = {
        "PGD": lambda: theirs.PGD(model, eps=epsilon, alpha=step, steps=20),
        "PGDL2": lambda: theirs.PGDL2(model, eps=epsilon, alpha=step, steps=20),
        "APGD": lambda: theirs.APGD(model, norm="Linf", eps=epsilon, steps=20),
        "APGD-L2": lambda: theirs.APGD(model, norm="L2", eps=epsilon, steps=20),
    }[name]()
    pixels = (x * STD + MEAN).clamp(0, 1)
    kind = APGD if name.startswith("APGD") else PGD
    ours = make(kind, norm, steps=20).perturb(net, x, y)
    expected, got = accuracy(model, public(pixels, y), y), accuracy(net, ours, y)
    print(f"{name}: torchattacks {expected:.3f}, ours {got:.3f}")
    assert got <= expected + 0.03


class Normalise(nn.Module):
    def forward(self, x):
        return (x - MEAN) / STD
