"""Projections, steps and random starts against references; units."""

from __future__ import annotations

import pytest
import torch
from attack_toys import MEAN, NORMS, PIXEL, STD, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from deepvision.attacks import PGD, InputScale, lp_norm, project, random_start, steepest_step


def boxes(n: int, d: int, seed: int):
    """Points, and boxes around the origin some of whose sides are closed; with ties and zeros."""
    g = torch.Generator().manual_seed(seed)
    u = 2 * torch.randn(n, d, generator=g, dtype=torch.float64)
    u = torch.where(torch.rand(u.shape, generator=g) < 0.3, u.round(), u)
    lo = -torch.rand(n, d, generator=g, dtype=torch.float64)
    hi = 2 * torch.rand(n, d, generator=g, dtype=torch.float64)
    lo[torch.rand(n, d, generator=g) < 0.2] = 0
    return u, lo, hi


def projection_by_multiplier(u, norm, epsilon, lo, hi):
    """Halve the Lagrange multiplier's interval 100 times; one coordinate at a time is trivial."""

    def point(t):
        shrunk = u / (1 + t) if norm == "l2" else u.sign() * (u.abs() - t).clamp(min=0)
        return shrunk.clamp(lo, hi)

    inside = lp_norm(point(torch.zeros(len(u), 1, dtype=u.dtype)), norm) <= epsilon
    low, high = torch.zeros(len(u), 1, dtype=u.dtype), torch.full((len(u), 1), 1e9, dtype=u.dtype)
    for _ in range(100):
        t = (low + high) / 2
        over = lp_norm(point(t), norm) > epsilon
        low, high = torch.where(over, t, low), torch.where(over, high, t)
    return torch.where(inside, point(torch.zeros_like(high)), point(high))


@given(
    st.integers(0, 10**6),
    st.sampled_from(["l2", "l1"]),
    st.sampled_from([0.0, 0.1, 0.7, 2.0, 100.0]),
    st.integers(1, 40),
)
@settings(max_examples=30, deadline=None)
def test_projections_match_the_multiplier_method(seed, norm, epsilon, d):
    u, lo, hi = boxes(5, d, seed)
    expected = projection_by_multiplier(u, norm, epsilon, lo, hi)
    torch.testing.assert_close(project(u, norm, epsilon, lo, hi), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_no_feasible_point_is_nearer_than_the_projection(norm):
    u, lo, hi = boxes(50, 8, 1)
    p = project(u, norm, 0.8, lo, hi)
    assert (lp_norm(p, norm) <= 0.8 + 1e-9).all()
    assert ((p >= lo) & (p <= hi)).all()
    assert torch.allclose(project(p, norm, 0.8, lo, hi), p, atol=1e-9)
    for seed in range(50):
        z = random_start(lo, hi, norm, 0.8, seeded(seed))
        assert (((u - p) * (z - p)).sum(1) <= 1e-9).all()  # the angle at a nearest point is obtuse


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_projections_of_large_images_in_float32(norm):
    torch.manual_seed(0)
    u, room = 0.05 * torch.randn(4, 3, 96, 96), torch.rand(4, 3, 96, 96)
    for epsilon in (0.5, 12.0, 300.0):
        p = project(u, norm, epsilon, -room, 1 - room)
        exact = project(u.double(), norm, epsilon, -room.double(), 1 - room.double())
        torch.testing.assert_close(p, exact.float(), atol=1e-6, rtol=1e-4)
        assert lp_norm(p, norm).max() <= epsilon * (1 + 1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_steps_have_unit_norm_and_no_better(norm):
    g = torch.randn(20, 3, 5, 5, generator=seeded(), dtype=torch.float64)
    step = steepest_step(g, norm)
    torch.testing.assert_close(lp_norm(step, norm), torch.ones_like(lp_norm(step, norm)))
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]
    torch.testing.assert_close((g * step).flatten(1).sum(1), lp_norm(g, dual).flatten())
    assert not steepest_step(torch.zeros_like(g), norm).any()


def test_sparse_steps_move_the_largest_coordinates_by_as_much():
    g = torch.randn(4, 30, generator=seeded())
    k = torch.tensor([1, 3, 30, 99])
    step = steepest_step(g, "l1", k)
    for row, gradient, count in zip(step, g, k.clamp(max=30).tolist(), strict=True):
        chosen = gradient.abs().topk(count).indices
        expected = torch.zeros(30).index_put((chosen,), gradient[chosen].sign() / count)
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize(("norm", "d"), [("linf", 3), ("l2", 3), ("l1", 3), ("l2", 2), ("l1", 1)])
def test_random_starts_are_uniform_in_the_ball(norm, d):
    wide = torch.full((20000, d), 9.0)
    delta = random_start(-wide, wide, norm, 2.0, seeded())
    # The share of a ball's volume within radius r is (r / epsilon)^d: a uniform number again.
    share = (lp_norm(delta, norm).flatten() / 2).pow(d).sort().values
    assert (share - torch.linspace(0, 1, len(share))).abs().max() < 0.02
    assert delta.mean(0).abs().max() < 0.04
    assert delta.abs().mean(0).std(correction=0) < 0.02


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_keep_to_the_box_and_their_seed(norm):
    lo, hi = -torch.rand(50, 3, 4, 4), torch.rand(50, 3, 4, 4)
    delta = random_start(lo, hi, norm, 5.0, seeded(1))
    assert ((delta >= lo) & (delta <= hi)).all()
    assert (lp_norm(delta, norm) <= 5.0 + 1e-5).all()
    assert torch.equal(delta, random_start(lo, hi, norm, 5.0, seeded(1)))
    assert not torch.equal(delta, random_start(lo, hi, norm, 5.0, seeded(2)))
    if norm == "linf":  # uniform between the bounds, not piled up on them
        inside = random_start(lo, hi, norm, 0.5, seeded(1))
        assert ((inside == lo) | (inside == hi)).float().mean() < 0.01


def test_the_three_units_are_one_attack(net, data):
    x, y = data
    std = (0.2, 0.2, 0.2)
    normalised = ((x * STD + MEAN) - MEAN) / 0.2
    results = []
    for unit, epsilon in (("normalised", 16 / 255 / 0.2), ("pixel", 16 / 255), ("255", 16)):
        attack = PGD(epsilon=epsilon, steps=5, pixels=InputScale(unit, PIXEL.mean, std))
        results.append(attack.perturb(net, normalised, y))
    for other in results[1:]:
        assert ((other - results[0]).abs() < 1e-4).float().mean() > 0.995
    assert (results[0] - normalised).abs().max().item() == pytest.approx(16 / 255 / 0.2, rel=1e-4)


def test_pixel_units_differ_by_channel_in_the_input(net, data):
    x, y = data
    x_adv = PGD(epsilon=4, pixels=InputScale("255")).perturb(net, x, y)
    reach = (x_adv - x).abs().amax(dim=(0, 2, 3))
    torch.testing.assert_close(reach, 4 / 255 / STD.flatten(), atol=1e-5, rtol=0)


def test_units_and_channels_are_checked():
    with pytest.raises(ValueError, match="unknown unit"):
        InputScale("bits")
    with pytest.raises(ValueError, match="3 channels"):
        PGD().perturb(lambda x: x.flatten(1), torch.zeros(2, 1, 4, 4))


def test_statistics_go_to_the_device_once_and_serve_evaluation_and_training():
    pixels, x = InputScale("pixel", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), torch.zeros(2, 3, 4, 4)
    with torch.inference_mode():
        first = pixels.scale(x)
    assert pixels.scale(x).data_ptr() == first.data_ptr()
    weight = torch.ones(1, 3, 1, 1, requires_grad=True)
    (weight * pixels.scale(x)).sum().backward()
    assert weight.grad.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert pixels.scale(x.double()).dtype == torch.float64
