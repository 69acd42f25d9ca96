"""Diagnostics on networks with one flaw each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diagnosed import (
    PIXELS,
    RADIUS,
    Healthy,
    Quantised,
    Randomised,
    Saturated,
    Stubborn,
    Trap,
    images,
    pgd,
)

from deepvision.attacks import (
    InputScale,
    add_random_noise,
    lp_norm,
    run_diagnostics,
    zero_gradient_mask,
)

NAMES = [
    "pixel range",
    "gradients",
    "randomness",
    "more steps",
    "noise",
    "loss",
    "targets",
    "large ε",
    "gradient-free search",
]
MASKED = {"gradients", "noise", "gradient-free search"}
WEAK = {"more steps", "loss", "targets", "gradient-free search"}
TRAPPED = {"noise", "loss", "targets", "large ε", "gradient-free search"}


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return images()


@pytest.mark.parametrize(
    ("model", "attack", "expected"),
    [
        (Healthy(), {}, set()),
        (Quantised(), {}, MASKED | {"large ε"}),
        (Randomised(), {}, {"randomness"}),
        (Healthy(), {"steps": 5, "step_size": 2.0}, WEAK),
        (Healthy(), {"step_size": 0.0}, {"noise", "gradient-free search"}),
        (Stubborn(), {}, {"noise", "large ε"}),
        (Saturated(), {}, {"gradients", "gradient-free search", "loss", "targets", "large ε"}),
        (Trap(), {"loss": "margin"}, TRAPPED),
    ],
    ids=[
        "healthy",
        "quantised",
        "randomised",
        "short steps",
        "no steps",
        "stubborn",
        "saturated",
        "trap",
    ],
)
@pytest.mark.filterwarnings("ignore:this model is randomised")
def test_each_diagnostic_fails_on_its_flaw(model, attack, expected, data):
    torch.manual_seed(0)
    diagnostics = list(run_diagnostics(model, *data, pgd(**attack)))
    assert [diagnostic.name for diagnostic in diagnostics] == NAMES
    found = {diagnostic.name for diagnostic in diagnostics if diagnostic.failed}
    assert found == expected
    for diagnostic in diagnostics:
        assert diagnostic.line().startswith("WARNING" if diagnostic.failed else "     ok")
        assert diagnostic.line().endswith(f"; next: {diagnostic.advice}") == diagnostic.failed


@pytest.mark.parametrize(
    ("pixels", "failed"),
    [
        (PIXELS, False),
        (InputScale("255", (0.0,) * 3, (1.0,) * 3), True),  # normalised images as if in [0, 1]
        (InputScale("255", PIXELS.mean, (0.05,) * 3), True),  # a small part of the range
    ],
)
def test_inputs_that_do_not_fit_the_pixel_range_are_noticed(pixels, failed, data):
    attack = replace(pgd(), pixels=pixels)
    diagnostic = next(iter(run_diagnostics(Healthy(), *data, attack)))
    assert diagnostic.name == "pixel range" and diagnostic.failed == failed


def test_a_gradient_vanishes_where_it_is_zero_at_every_pixel(data):
    class OfOneHalf(Healthy):
        def forward(self, x):
            dull = x[:, :1, :1, :1].mean((1, 2, 3)) > x[:, :1, :1, :1].mean()
            x = torch.cat([x[:, :, :6], x[:, :, 6:].detach()], 2)
            return super().forward(torch.where(dull[:, None, None, None], x.detach(), x))

    x, y = data
    first = x[:, 0, 0, 0]
    assert zero_gradient_mask(OfOneHalf(), x, y).tolist() == (first > first.mean()).tolist()


@pytest.mark.parametrize("norm", RADIUS)
def test_noise_has_the_size_of_the_attack(norm, data):
    delta = (add_random_noise(data[0], pgd(norm)) - data[0]) * PIXELS.scale(data[0])
    sizes = lp_norm(delta, norm).flatten()
    assert (sizes <= RADIUS[norm] * (1 + 1e-4)).all() and sizes.mean() > 0.6 * RADIUS[norm]
