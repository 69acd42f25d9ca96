"""Diagnostics on networks with one flaw each."""

from __future__ import annotations

import pytest
import torch
from diagnosed import PIXELS, RADIUS, Healthy, Quantised, Randomised, Stubborn, images, pgd

from deepvision.attacks import add_random_noise, lp_norm, run_diagnostics, zero_gradient_mask

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
    ],
    ids=["healthy", "quantised", "randomised", "short steps", "no steps", "stubborn"],
)
def test_each_light_warns_of_its_illness(model, attack, expected, data):
    torch.manual_seed(0)
    lights = list(run_diagnostics(model, *data, pgd(**attack)))
    assert [light.name for light in lights] == NAMES
    found = {light.name for light in lights if light.failed}
    assert found == expected
    for light in lights:
        assert light.line().startswith("WARNING" if light.failed else "     ok")


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
