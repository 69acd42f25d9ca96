"""Attacks of public libraries are not stronger."""

from __future__ import annotations

import pytest
import torch
from attack_toys import (
    CLASSES,
    MEAN,
    PIXEL,
    RADIUS,
    STD,
    accuracy,
    batch,
    make,
    share_fooled,
)
from torch import nn

from deepvision.attacks import APGD, PGD, AutoAttack
from deepvision.attacks.autoattack import other_labels


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


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd-t (dlr)", "fab-t", "square"])
def test_no_part_of_torchattacks_autoattack_is_stronger(name, norm, net):
    """Image by image, up to two that a seed decides."""
    theirs = pytest.importorskip("torchattacks", reason="torchattacks is an optional dependency")
    x, y = batch(96, 2000)
    model = nn.Sequential(Normalise(), net).eval()
    options = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": 0.8 * RADIUS[norm]}
    public = {
        "apgd-t (dlr)": lambda: theirs.APGDT(model, steps=20, n_classes=CLASSES, **options),
        "fab-t": lambda: theirs.FAB(
            model, steps=20, multi_targeted=True, n_classes=CLASSES, **options
        ),
        "square": lambda: theirs.Square(model, n_queries=200, **options),
    }[name]()
    pixels = (x * STD + MEAN).clamp(0, 1)
    fooled = share_fooled(model, public(pixels, y), y)
    suite = AutoAttack(norm=norm, epsilon=0.8 * RADIUS[norm], pixels=PIXEL, steps=20, queries=200)
    stages = [stage for stage in suite.stages(CLASSES) if stage.name == name]
    others, ours = other_labels(net(x), y), torch.zeros_like(fooled)
    for stage in stages:
        target = None if stage.rank is None else others[:, stage.rank]
        ours |= share_fooled(net, stage.attack.perturb(net, x, y, target), y)
    print(f"{name} {norm}: torchattacks {fooled.sum()}, ours {ours.sum()} of {len(y)}")
    assert (fooled & ~ours).sum() <= 2


@pytest.mark.parametrize(("norm", "share"), [("linf", 0.9), ("l2", 0.9), ("l1", 0.6)])
def test_the_official_autoattack_is_not_stronger(norm, share, net):
    """The standard set, image by image, up to four that a seed decides."""
    official = pytest.importorskip("pyautoattack", reason="needs pip install pyautoattack")
    x, y = batch(96, 2000)
    epsilon = share * RADIUS[norm]
    model, pixels = nn.Sequential(Normalise(), net).eval(), (x * STD + MEAN).clamp(0, 1)
    attack = official.AutoAttack(model, norm=norm.capitalize(), eps=epsilon, seed=0)
    for part in (attack.apgd, attack.apgd_targeted, attack.fab):
        part.n_iter, part.n_target_classes = 50, CLASSES - 1
    attack.square.n_queries = 200
    fooled = share_fooled(model, attack.run_standard_evaluation(pixels, y, batch_size=96)[0], y)
    assert 0.2 < fooled.float().mean() < 0.9  # what is left of the images depends on the attack
    suite = AutoAttack(norm=norm, epsilon=epsilon, pixels=PIXEL, steps=50, queries=200)
    fell = torch.tensor([name is not None for name in suite.run(net, x, y).fell_to])
    print(f"{norm}: official {fooled.sum()}, ours {fell.sum()} of {len(y)}")
    assert (fooled & ~fell).sum() <= 4
