"""Health lights on networks with one illness each, Square attack, intervals, the sweep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepvision.attacks import diagnostics
from deepvision.attacks.diagnostics import (
    add_random_noise,
    budget,
    describe,
    run_diagnostics,
    sweep,
    table,
    wilson,
    zero_gradient_mask,
)
from deepvision.attacks.norms import InputScale, size
from deepvision.attacks.pgd import PGD
from deepvision.attacks.square import Square

PIXELS = InputScale("255", (0.5, 0.4, 0.6), (0.25, 0.2, 0.3))
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (PIXELS.mean, PIXELS.std))
CLASSES, SIDE = 6, 12
RADIUS = {"linf": 16, "l2": 320, "l1": 2600}


class Healthy(nn.Module):
    """Compares an image with six smooth templates; no training needed."""

    def __init__(self):
        super().__init__()
        small = torch.rand(CLASSES, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        templates = F.interpolate(small, size=SIDE, mode="bilinear")
        self.templates = nn.Parameter(templates - templates.mean(0))

    def forward(self, x):
        pixels = x * STD + MEAN
        return torch.einsum("nchw,kchw->nk", pixels - 0.5, self.templates)


class Quantised(Healthy):
    def forward(self, x):
        return super().forward((x * 8).round() / 8)


class Randomised(Healthy):
    def forward(self, x):
        return super().forward(x + 1e-3 * torch.randn_like(x))


class Stubborn(Healthy):
    """Answers 0 whatever it sees."""

    def forward(self, x):
        return 1e-3 * super().forward(x) + torch.eye(CLASSES)[0]


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    y = torch.arange(60) % CLASSES
    templates = Healthy().templates.detach()
    pixels = 0.5 + 0.2 * templates[y] + 0.1 * torch.randn(60, 3, SIDE, SIDE, generator=g)
    return (pixels.clamp(0, 1) - MEAN) / STD, y


def left(model, x, y) -> float:
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == y).float().mean().item()


def pgd(norm: str = "linf", **options) -> PGD:
    return PGD(norm=norm, pixels=PIXELS, **{"epsilon": RADIUS[norm], "steps": 10} | options)


NAMES = [
    "gradients",
    "randomness",
    "more steps",
    "noise",
    "large ε",
    "gradient-free search",
]
MASKED = {"gradients", "noise", "gradient-free search"}


@pytest.mark.parametrize(
    ("model", "attack", "expected"),
    [
        (Healthy(), {}, set()),
        (Quantised(), {}, MASKED | {"large ε"}),
        (Randomised(), {}, {"randomness"}),
        (Healthy(), {"steps": 5, "step_size": 2.0}, {"more steps"}),
        (Healthy(), {"step_size": 0.0}, {"noise", "gradient-free search"}),
        (Stubborn(), {}, {"noise", "large ε"}),
    ],
    ids=["healthy", "quantised", "randomised", "short steps", "no steps", "stubborn"],
)
def test_each_light_warns_of_its_illness(model, attack, expected, data):
    torch.manual_seed(0)
    lights = list(run_diagnostics(model, *data, pgd(**attack)))
    assert [light.name for light in lights] == NAMES
    found = {light.name for light in lights if light.warns}
    assert found == expected
    for light in lights:
        assert light.line().startswith("WARNING" if light.warns else "     ok")


@pytest.mark.parametrize("norm", RADIUS)
@pytest.mark.parametrize("goal", ["untargeted", "least_likely"])
def test_square_keeps_to_ball_and_box_and_beats_noise(norm, goal, data):
    model, (x, y) = Healthy(), data
    epsilon = 2 * RADIUS[norm]
    options = {"norm": norm, "epsilon": epsilon, "pixels": PIXELS, "goal": goal}
    square = Square(**options, generator=torch.Generator().manual_seed(0))
    x_adv = square.perturb(model, x, y)
    delta = (x_adv - x) * PIXELS.scale(x)
    assert (size(delta, norm) <= epsilon * (1 + 1e-4)).all()
    pixels = x_adv * STD + MEAN
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5
    noise = add_random_noise(x, pgd(norm, epsilon=epsilon))
    assert left(model, x_adv, y) < left(model, noise, y) - 20
    again = replace(square, generator=torch.Generator().manual_seed(0)).perturb(model, x, y)
    assert torch.equal(x_adv, again)


def test_a_gradient_vanishes_where_it_is_zero_at_every_pixel(data):
    class OfOneHalf(Healthy):
        def forward(self, x):
            dull = x[:, :1, :1, :1].mean((1, 2, 3)) > x[:, :1, :1, :1].mean()
            x = torch.cat([x[:, :, :6], x[:, :, 6:].detach()], 2)
            return super().forward(torch.where(dull[:, None, None, None], x.detach(), x))

    x, y = data
    first = x[:, 0, 0, 0]
    assert zero_gradient_mask(OfOneHalf(), x, y).tolist() == (first > first.mean()).tolist()


def test_square_asks_no_gradient_and_keeps_the_best_it_saw(data):
    calls, x, y = [], *data
    net = Healthy()

    def model(images):
        assert not torch.is_grad_enabled() and not images.requires_grad
        calls.append(len(images))
        return net(images)

    long = Square(epsilon=4, pixels=PIXELS, early_stop=False, steps=40)
    for steps in (0, 10, 40):
        torch.manual_seed(0)
        calls.clear()
        replace(long, steps=steps).perturb(model, x, y)
        assert calls == [len(x)] * (steps + 1)
    seen = []

    def margin_of(logits, labels, _):
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        seen.append(others - logits.gather(1, labels[:, None])[:, 0])
        return seen[-1]

    x_adv = replace(long, loss=margin_of).perturb(net, x, y)
    best = torch.stack(seen).amax(0)
    with torch.no_grad():
        torch.testing.assert_close(margin_of(net(x_adv), y, None), best)


def test_squares_shrink_on_the_papers_schedule():
    square = Square(steps=10_000, share=0.8)
    sides = [square.side(i, 100, 100) for i in (10, 11, 51, 201, 1001, 8001)]
    expected = [(0.8 / 2**k * 100 * 100) ** 0.5 for k in (0, 1, 2, 3, 4, 8)]
    assert sides == [round(side) for side in expected]
    assert replace(square, steps=100).side(100, 100, 100) == square.side(10_000, 100, 100)


@pytest.mark.parametrize("norm", RADIUS)
def test_noise_has_the_size_of_the_attack(norm, data):
    delta = (add_random_noise(data[0], pgd(norm)) - data[0]) * PIXELS.scale(data[0])
    sizes = size(delta, norm).flatten()
    assert (sizes <= RADIUS[norm] * (1 + 1e-4)).all() and sizes.mean() > 0.6 * RADIUS[norm]


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 20, 0.0, 16.11), (10, 20, 29.93, 70.07), (81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05)],
)
def test_wilson_intervals_are_the_published_ones(hits, n, low, high):
    """The last two: Newcombe, 1998, table I, method 3."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=0.01)


def test_budgets_in_both_units():
    words = budget("linf", 8, (0.229, 0.224, 0.225))
    assert words == "l_inf, ε = 8/255 = (0.137, 0.140, 0.139) normalised in R, G, B"
    assert budget("l2", 512, STD.flatten()) == "l_2, ε = 512/255 = 2.01 in pixels of [0, 1]"
    assert describe(pgd(steps=0)).startswith("untargeted PGD, 0 steps, l_inf")


def test_a_sweep_is_the_attack_at_each_pair(data, monkeypatch):
    monkeypatch.setattr(diagnostics, "STEPS", (1, 5))
    monkeypatch.setattr(diagnostics, "FACTORS", (4, 16))
    model, (x, y) = Healthy(), data
    points = list(sweep(model, x, y, pgd()))
    expected = [(0, 0, left(model, x, y))]
    for epsilon in (4, 16):
        for steps in (1, 5):
            x_adv = pgd(epsilon=epsilon, steps=steps).perturb(model, x, y)
            expected.append((epsilon, steps, left(model, x_adv, y)))
    assert [p[:2] for p in points] == [p[:2] for p in expected]
    assert [p[2] for p in points] == pytest.approx([p[2] for p in expected])
    lines = table("linf", points, len(y)).splitlines()
    assert lines[2] == "| ε / 255 | 1 steps | 5 steps |"
    assert lines[4] == f"| 4 | {points[1][2]:.1f} | {points[2][2]:.1f} |"
