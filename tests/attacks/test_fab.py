"""FAB: its projection against optimality conditions, its perturbations on a linear network."""

from __future__ import annotations

import pytest
import torch
from attack_toys import NORMS, PIXEL, RADIUS, make, share_fooled
from torch import nn

from deepvision.attacks import FAB, InputScale, lp_norm
from deepvision.attacks.fab import step_to_hyperplane


def problem(reachable: bool):
    """Points in a box, a hyperplane that it reaches or not; some weights and some bounds are 0."""
    g = torch.Generator().manual_seed(0)
    delta, w = (torch.randn(200, 12, generator=g, dtype=torch.float64) for _ in range(2))
    lo = delta - torch.rand(delta.shape, generator=g, dtype=torch.float64)
    hi = delta + torch.rand(delta.shape, generator=g, dtype=torch.float64)
    w[torch.rand(w.shape, generator=g) < 0.2] = 0
    lo = torch.where(torch.rand(w.shape, generator=g) < 0.2, delta, lo)
    furthest = torch.where(w > 0, hi, lo)
    weight = torch.rand(200, 1, generator=g, dtype=torch.float64)
    b = (w * torch.lerp(delta, furthest, weight if reachable else 1.5 + weight)).sum(1)
    return delta, w, b, lo, hi, furthest


@pytest.mark.parametrize("norm", NORMS)
def test_the_step_reaches_the_hyperplane_within_the_box(norm):
    delta, w, b, lo, hi, _ = problem(reachable=True)
    d = step_to_hyperplane(delta, w, b, norm, lo, hi)
    torch.testing.assert_close((w * (delta + d)).sum(1), b)
    assert (delta + d >= lo - 1e-12).all() and (delta + d <= hi + 1e-12).all()


@pytest.mark.parametrize("norm", NORMS)
def test_no_feasible_step_is_shorter(norm):
    """Any z in the box beyond the hyperplane is at least as far: z is a mean with a far corner."""
    delta, w, b, lo, hi, furthest = problem(reachable=True)
    shortest = lp_norm(step_to_hyperplane(delta, w, b, norm, lo, hi), norm)
    g = torch.Generator().manual_seed(1)
    for _ in range(300):
        z = torch.where(torch.rand(w.shape, generator=g) < 0.5, delta, furthest)
        z = torch.lerp(z, furthest, torch.rand(z.shape, generator=g, dtype=torch.float64) ** 3)
        beyond = (w * z).sum(1) >= b
        assert (lp_norm(z - delta, norm)[beyond] >= shortest[beyond] - 1e-9).all()


@pytest.mark.parametrize("norm", NORMS)
def test_an_unreachable_hyperplane_gives_the_nearest_corner(norm):
    delta, w, b, lo, hi, furthest = problem(reachable=False)
    d = step_to_hyperplane(delta, w, b, norm, lo, hi)
    torch.testing.assert_close(delta + d, torch.where(w == 0, delta, furthest))


@pytest.mark.parametrize(("norm", "dual"), [("linf", "l1"), ("l2", "l2"), ("l1", "linf")])
def test_on_a_linear_network_the_boundary_is_exact(norm, dual):
    """The distance to z_t = z_y is |z_t - z_y| / |w_t - w_y|, in the dual norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).double()
    x = torch.rand(20, 3, 4, 4, dtype=torch.float64) * 0.02 + 0.49
    logits = model(x)
    y, t = logits.argmax(1), logits.topk(2, 1).indices[:, 1]
    w = model[1].weight[t] - model[1].weight[y]
    distance = (w * x.flatten(1)).sum(1) + model[1].bias[t] - model[1].bias[y]
    distance = distance.abs() / lp_norm(w, dual).flatten()
    unit = InputScale("pixel", (0.0,) * 3, (1.0,) * 3)
    attack = FAB(norm=norm, epsilon=distance.median().item(), pixels=unit, early_stop=False)
    x_adv = attack.perturb(model, x, y, t)
    found = lp_norm(x_adv - x, norm).flatten()
    within = distance < 0.98 * attack.epsilon
    assert (found[within] > 0).all() and (found[distance > attack.epsilon] == 0).all()
    torch.testing.assert_close(found[within], distance[within], rtol=0.03, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_it_keeps_to_ball_and_box_and_stops_early_with_the_same_images(norm, net, data):
    x, y = data
    target = net(x).topk(2, 1).indices[:, 1]
    results = []
    for early_stop in (False, True):
        attack = make(FAB, norm, epsilon=0.7 * RADIUS[norm], steps=15, early_stop=early_stop)
        x_adv = attack.perturb(net, x, y, target)
        delta = (x_adv - x) * PIXEL.scale(x)
        assert (lp_norm(delta, norm) <= attack.epsilon * (1 + 1e-4)).all()
        assert PIXEL.misfit(x_adv) is None
        results.append(share_fooled(net, x_adv, y))
    assert torch.equal(*results) and results[0].any()


def test_it_needs_a_target(net, data):
    with pytest.raises(ValueError, match="needs a target"):
        make(FAB, "l2", goal="untargeted").perturb(net, *data)
