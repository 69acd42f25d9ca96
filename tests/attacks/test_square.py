"""Square attack: ball and box, no gradients, the schedule of the paper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diagnosed import MEAN, PIXELS, RADIUS, STD, Healthy, images, pgd

from deepvision.attacks import Square, accuracy_under_attack, add_random_noise, lp_norm


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return images()


@pytest.mark.parametrize("norm", RADIUS)
@pytest.mark.parametrize("goal", ["untargeted", "least_likely"])
def test_square_keeps_to_ball_and_box_and_beats_noise(norm, goal, data):
    model, (x, y) = Healthy(), data
    epsilon = 2 * RADIUS[norm]
    options = {"norm": norm, "epsilon": epsilon, "pixels": PIXELS, "goal": goal}
    square = Square(**options, generator=torch.Generator().manual_seed(0))
    x_adv = square.perturb(model, x, y)
    delta = (x_adv - x) * PIXELS.scale(x)
    assert (lp_norm(delta, norm) <= epsilon * (1 + 1e-4)).all()
    pixels = x_adv * STD + MEAN
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5
    noise = add_random_noise(x, pgd(norm, epsilon=epsilon))
    assert (
        accuracy_under_attack(model, None, x_adv, y)
        < accuracy_under_attack(model, None, noise, y) - 20
    )
    again = replace(square, generator=torch.Generator().manual_seed(0)).perturb(model, x, y)
    assert torch.equal(x_adv, again)


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


def test_squares_shrink_on_autoattacks_schedule():
    for steps in (100, 10_000):  # whatever the number of queries
        square = Square(steps=steps, p=0.8)
        sides = [square.side(i, 100, 100) for i in (10, 11, 51, 201, 501, 1001, 8001)]
        expected = [(0.8 / 2**k * 100 * 100) ** 0.5 for k in (0, 1, 2, 3, 4, 5, 9)]
        assert sides == [round(side) for side in expected]
