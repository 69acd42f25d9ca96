"""Attacks: geometry against references, properties on a trained network, what they leave behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepvision.attacks.norms import InputScale, project, random_start, size, steepest_step
from deepvision.attacks.pgd import (
    APGD,
    FGSM,
    LOSSES,
    PGD,
    attack_succeeded,
    checkpoints,
    cosine,
    frozen_eval_mode,
)
from student_code import PGDAttack

NORMS = ("linf", "l2", "l1")
RADIUS = {"linf": 16 / 255, "l2": 1.2, "l1": 16.0}  # in pixels of [0, 1], for images 3x16x16
PIXEL = InputScale("pixel")
MEAN = torch.tensor(PIXEL.mean).view(1, 3, 1, 1)
STD = torch.tensor(PIXEL.std).view(1, 3, 1, 1)
CLASSES = 6
SLACK = 0.06  # CPUs round differently, so that the trained net is not the same everywhere


class Net(nn.Module):
    """BatchNorm and dropout on purpose: both must be in evaluation mode during an attack."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(256, CLASSES),
        )

    def forward(self, x):
        return self.body(x)


def batch(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Six smooth random templates under strong noise: normalised images and labels."""
    templates = torch.rand(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=g)
    x = F.interpolate(templates, size=16, mode="bilinear")[y]
    x = 0.25 + 0.5 * x + 0.25 * torch.randn(x.shape, generator=g)
    return (x.clamp(0, 1) - MEAN) / STD, y


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        x, y = batch(64, step + 1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return batch(64, 1000)


def accuracy(model, x, y) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def share_fooled(model, x, y) -> torch.Tensor:
    with torch.no_grad():
        return model(x).argmax(1) != y


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(kind, norm: str, **kwargs):
    """An attack of the usual radius, in pixels of [0, 1], with its own random numbers."""
    defaults = {"epsilon": RADIUS[norm], "pixels": PIXEL, "generator": seeded()}
    return kind(norm=norm, **(defaults | kwargs))


# Geometry


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

    inside = size(point(torch.zeros(len(u), 1, dtype=u.dtype)), norm) <= epsilon
    low, high = torch.zeros(len(u), 1, dtype=u.dtype), torch.full((len(u), 1), 1e9, dtype=u.dtype)
    for _ in range(100):
        t = (low + high) / 2
        over = size(point(t), norm) > epsilon
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
    assert (size(p, norm) <= 0.8 + 1e-9).all()
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
        assert size(p, norm).max() <= epsilon * (1 + 1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_steps_have_unit_norm_and_no_better(norm):
    g = torch.randn(20, 3, 5, 5, generator=seeded(), dtype=torch.float64)
    step = steepest_step(g, norm)
    torch.testing.assert_close(size(step, norm), torch.ones_like(size(step, norm)))
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]
    torch.testing.assert_close((g * step).flatten(1).sum(1), size(g, dual).flatten())
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
    share = (size(delta, norm).flatten() / 2).pow(d).sort().values
    assert (share - torch.linspace(0, 1, len(share))).abs().max() < 0.02
    assert delta.mean(0).abs().max() < 0.04
    assert delta.abs().mean(0).std(correction=0) < 0.02


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_keep_to_the_box_and_their_seed(norm):
    lo, hi = -torch.rand(50, 3, 4, 4), torch.rand(50, 3, 4, 4)
    delta = random_start(lo, hi, norm, 5.0, seeded(1))
    assert ((delta >= lo) & (delta <= hi)).all()
    assert (size(delta, norm) <= 5.0 + 1e-5).all()
    assert torch.equal(delta, random_start(lo, hi, norm, 5.0, seeded(1)))
    assert not torch.equal(delta, random_start(lo, hi, norm, 5.0, seeded(2)))
    if norm == "linf":  # uniform between the bounds, not piled up on them
        inside = random_start(lo, hi, norm, 0.5, seeded(1))
        assert ((inside == lo) | (inside == hi)).float().mean() < 0.01


# Units


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


# Losses


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


# Attacks


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [FGSM, PGD, APGD])
@pytest.mark.parametrize("unit", ["normalised", "pixel"])
def test_ball_and_box(kind, norm, unit, net, data):
    x, y = data
    for random in (False, True):
        attack = make(kind, norm, random_start=random, pixels=InputScale(unit), loss="margin")
        x_adv = attack.perturb(net, x, y)
        delta = x_adv - x if unit == "normalised" else (x_adv - x) * STD
        assert size(delta, norm).max() <= attack.epsilon * (1 + 1e-4)
        pixels = x_adv * STD + MEAN
        assert pixels.min() >= -1e-5
        assert pixels.max() <= 1 + 1e-5
        assert not torch.equal(x_adv, x)


@pytest.mark.parametrize("norm", NORMS)
def test_accuracy_falls_with_epsilon_to_nothing(norm, net, data):
    x, y = data
    for kind, steps in ((PGD, 10), (APGD, 10)):
        curve = [
            accuracy(
                net, make(kind, norm, steps=steps, epsilon=s * RADIUS[norm]).perturb(net, x, y), y
            )
            for s in (0, 0.7, 1.0, 1.4, 2)
        ]
        assert curve[0] == accuracy(net, x, y) >= 0.95
        assert all(a >= b - SLACK for a, b in zip(curve, curve[1:], strict=False)), curve
        assert curve[1] > curve[3] and curve[-1] <= SLACK, curve


@pytest.mark.parametrize("norm", NORMS)
def test_better_attacks_are_stronger_and_noise_is_none(norm, net, data):
    x, y = data
    noise = make(PGD, norm, steps=1, step_size=0.0, random_start=True)
    fgsm, pgd, apgd = (make(kind, norm) for kind in (FGSM, PGD, APGD))
    scores = [accuracy(net, a.perturb(net, x, y), y) for a in (noise, fgsm, pgd, apgd)]
    assert scores[0] >= 0.95
    assert scores[1] >= scores[2] + 0.05
    assert scores[2] >= scores[3] - SLACK
    assert scores[2] < 0.6


def test_sparse_l1_steps_beat_dense_ones_by_far(net, data):
    x, y = data
    dense = accuracy(net, make(PGD, "l1", sparsity=1.0).perturb(net, x, y), y)
    sparse = accuracy(net, make(PGD, "l1").perturb(net, x, y), y)
    adaptive = accuracy(net, make(APGD, "l1").perturb(net, x, y), y)
    assert max(sparse, adaptive) < dense - 0.2


class Shifty(nn.Module):
    """The class that it finds least likely changes with every call."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x):
        self.calls += 1
        shift = torch.zeros(CLASSES)
        shift[self.calls % CLASSES] = -100.0
        return self.net(x) + shift


@pytest.mark.parametrize("kind", [FGSM, PGD, APGD])
def test_the_least_likely_label_is_that_of_the_clean_image_throughout(kind, net, data):
    seen = []

    def loss(logits, y, t):
        seen.append(t)
        return LOSSES["ce"](logits, y, t)

    attack = make(kind, "linf", goal="least_likely", loss=loss, restarts=2, early_stop=False)
    attack.perturb(Shifty(net), *data)
    assert len(seen) >= attack.steps
    assert all((t == 1).all() for t in seen)  # the first call sees the clean image


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_targets_are_reached(kind, net, data):
    x, y = data
    strong = {"epsilon": 3 * RADIUS["linf"], "steps": 20}
    for loss in ("ce", "margin"):
        attack = make(kind, "linf", goal="least_likely", loss=loss, **strong)
        assert accuracy(net, attack.perturb(net, x, y), net(x).argmin(1)) >= 0.9
    attack = make(kind, "linf", goal="target", **strong)
    for target in ((y + 2) % CLASSES, 3):
        reached = torch.as_tensor(target).expand(len(y))
        assert accuracy(net, attack.perturb(net, x, y, target), reached) >= 0.9
    with pytest.raises(ValueError, match="needs target"):
        attack.perturb(net, x, y)
    # The targeted DLR pits the target against the true label alone, so a third class may win.
    attack = make(kind, "linf", goal="random", loss="dlr", **strong)
    assert accuracy(net, attack.perturb(net, x, y), y) <= 0.1


def test_random_targets_are_any_label_but_the_true_one(net):
    seen = []

    def loss(logits, y, t):
        seen.append(t)
        return LOSSES["ce"](logits, y, t)

    x, y = batch(400, 5)
    make(PGD, "linf", goal="random", loss=loss, steps=2).perturb(net, x, y)
    assert torch.equal(seen[0], seen[1])
    away = (seen[0] - y) % CLASSES
    assert away.bincount(minlength=CLASSES)[0] == 0
    assert away.bincount(minlength=CLASSES)[1:].min() > 50


def test_without_labels_the_models_own_are_left(net, data):
    x, _ = data
    own = net(x).argmax(1)
    assert torch.equal(make(PGD, "linf").perturb(net, x), make(PGD, "linf").perturb(net, x, own))


@pytest.mark.parametrize("kind", [PGD, APGD])
@pytest.mark.parametrize("early_stop", [False, True])
def test_restarts_are_never_weaker_image_by_image(kind, early_stop, net, data):
    x, y = data
    common = {"steps": 4, "random_start": True, "early_stop": early_stop, "loss": "margin"}
    once, often = (
        share_fooled(net, make(kind, "l2", restarts=r, **common).perturb(net, x, y), y)
        for r in (1, 4)
    )
    assert (often >= once).all()
    assert kind is APGD or often.sum() > once.sum()


def test_among_runs_the_highest_loss_is_kept(net, data):
    x, y = data
    losses = []
    for restarts in (1, 3):
        attack = make(PGD, "l2", epsilon=0.4, steps=2, random_start=True, restarts=restarts)
        with torch.no_grad():
            logits = net(attack.perturb(net, x, y))
        assert (logits.argmax(1) == y).float().mean() > 0.9
        losses.append(F.cross_entropy(logits, y, reduction="none"))
    assert (losses[1] >= losses[0] - 1e-5).all()
    assert (losses[1] > losses[0] + 1e-5).any()


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_early_stop_fools_as_many_with_less_compute(kind, net, data):
    x, y = data
    images, results = [], []
    hook = net.register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    for early_stop in (False, True):
        images.clear()
        attack = make(kind, "linf", epsilon=1.5 * RADIUS["linf"], steps=20, early_stop=early_stop)
        x_adv = attack.perturb(net, x, y)
        results.append((sum(images), x_adv))
    hook.remove()
    (all_passes, full), (fewer_passes, early) = results
    assert fewer_passes < 0.7 * all_passes
    assert (share_fooled(net, early, y) >= share_fooled(net, full, y)).all()


def test_early_stop_leaves_wrong_images_alone_and_may_have_nothing_to_do(net, data):
    x, y = data
    wrong = (net(x).argmax(1) + 1) % CLASSES
    for kind in (FGSM, PGD, APGD):
        attack = make(kind, "l1", early_stop=True, restarts=2)
        assert torch.equal(attack.perturb(net, x, wrong), x)


def test_the_schedule_scales_the_steps(net, data):
    x, y = data
    common = {"epsilon": 1.0, "steps": 4, "step_size": 0.01, "pixels": InputScale()}
    inner = x.clamp(-1, 1)
    for schedule, travel in ((None, 4.0), (cosine, sum(cosine(i, 4) for i in range(4)))):
        kwargs = common | ({"schedule": schedule} if schedule else {})
        x_adv = make(PGD, "linf", **kwargs).perturb(net, inner, y)
        assert (x_adv - inner).abs().max().item() == pytest.approx(0.01 * travel, rel=1e-3)
    assert [cosine(i, 2) for i in (0, 1, 2)] == pytest.approx([1, 0.5, 0])


def test_steps_follow_epsilon_unless_given():
    attack = PGD(epsilon=0.2, steps=5)
    assert attack.base_step() == pytest.approx(0.1)
    assert replace(attack, epsilon=0.1).base_step() == pytest.approx(0.05)
    assert replace(attack, step_size=0.3).base_step() == 0.3
    assert FGSM(epsilon=0.2).base_step() == 0.2
    assert FGSM(epsilon=0.2, random_start=True).base_step() == pytest.approx(0.25)


@pytest.mark.parametrize("kind", [FGSM, PGD, APGD])
def test_no_step_and_no_budget_change_nothing(kind, net, data):
    x, y = data
    assert torch.equal(make(kind, "linf", steps=0).perturb(net, x, y), x)
    for norm in NORMS:
        attack = make(kind, norm, epsilon=0.0, random_start=True)
        torch.testing.assert_close(attack.perturb(net, x, y), x, atol=1e-6, rtol=0)


def test_bad_arguments_are_refused():
    for bad in ({"norm": "l3"}, {"goal": "nearest"}, {"loss": "mse"}):
        with pytest.raises(ValueError, match="unknown .*: one of"):
            PGD(**bad)
    for bad in ({"epsilon": -1.0}, {"steps": -1}, {"restarts": 0}):
        with pytest.raises(ValueError, match="negative"):
            PGD(**bad)


@pytest.mark.parametrize("goal", ["untargeted", "least_likely"])
def test_pgd_and_the_assignments_attack_are_one_where_they_overlap(goal, net, data):
    y = data[1][:32]
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (PIXEL.mean, PIXEL.std)
    )
    x = (torch.rand(32, 3, 16, 16, dtype=torch.float64) - mean) / std
    double = Net().double().eval()
    double.load_state_dict(net.state_dict())
    simple = PGDAttack(nn.CrossEntropyLoss(), 8, 0.02, 0.1, targeted=goal == "least_likely")
    general = PGD(epsilon=0.1, step_size=0.02, steps=8, goal=goal)
    expected = simple.perturb(double, x, y if goal == "untargeted" else None)
    torch.testing.assert_close(general.perturb(double, x, y), expected, atol=1e-9, rtol=0)


def test_checkpoints_are_the_papers():
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [0, 1]


def test_apgd_takes_smaller_steps_when_the_loss_stalls():
    """On -|x - peak| steps of 2 epsilon overshoot for ever; halved ones end near every peak."""
    x, peak = torch.zeros(9, 1, 1, 1), torch.linspace(-0.8, 0.8, 9)

    def loss(logits, y, t):
        return -(logits[:, 0] - peak).abs()

    options = {"pixels": InputScale("normalised", (0.5,), (0.5,)), "random_start": False}
    apgd = APGD(epsilon=0.9, steps=40, loss=loss, early_stop=False, **options)
    found = apgd.perturb(lambda x: x.flatten(1), x, torch.zeros(9, dtype=torch.long))
    assert (found.flatten() - peak).abs().max() < 0.03


# What an attack leaves behind


def snapshot(model: nn.Module) -> list:
    return [
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [t.clone() for t in model.state_dict().values()],
    ]


def assert_same(before: list, after: list) -> None:
    assert before[:2] == after[:2]
    for (old_id, old), (new_id, new) in zip(before[2], after[2], strict=True):
        assert old_id == new_id and (old is None or torch.equal(old, new))
    assert all(map(torch.equal, before[3], after[3]))


@pytest.fixture
def used() -> Net:
    """In training mode but for one layer, with a frozen parameter and gradients of its own."""
    model = Net().train()
    model.body[1].eval()
    model.body[0].bias.requires_grad_(False)
    model(batch(4, 1)[0]).sum().backward()
    return model


@pytest.mark.parametrize("kind", [FGSM, PGD, APGD])
@pytest.mark.parametrize("options", [{}, {"restarts": 2, "early_stop": True}])
def test_model_and_input_are_left_as_they_were(kind, options, used, data):
    x, y = data[0].clone().requires_grad_(True), data[1]
    before = snapshot(used)
    x_adv = make(kind, "linf", goal="least_likely", **options).perturb(used, x, y)
    assert_same(before, snapshot(used))
    assert torch.equal(x, data[0]) and x.grad is None and x._version == 0
    assert not x_adv.requires_grad and x_adv.grad_fn is None


@pytest.mark.parametrize("call", [1, 3])
def test_a_model_that_raises_is_left_as_it_was(call, used, data):
    calls = []

    def fail(module, args):
        calls.append(1)
        assert not module.training and not any(p.requires_grad for p in module.parameters())
        if len(calls) == call:
            raise RuntimeError("out of memory")

    used.register_forward_pre_hook(fail)
    before = snapshot(used)
    with pytest.raises(RuntimeError, match="out of memory"):
        make(PGD, "l1", early_stop=True).perturb(used, *data)
    assert_same(before, snapshot(used))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [PGD, APGD])
def test_it_works_without_gradients_and_on_inference_tensors(kind, mode, net, data):
    expected = make(kind, "l2").perturb(net, *data)
    with mode():
        x, y = data[0].clone(), data[1].clone()
        assert torch.equal(make(kind, "l2").perturb(net, x, y), expected)
    assert torch.equal(make(kind, "l2").perturb(net, x, y), expected)


def test_the_model_is_any_callable(net, data):
    expected = make(PGD, "linf").perturb(net, *data)
    assert torch.equal(make(PGD, "linf").perturb(lambda x: net(x), *data), expected)
    with frozen_eval_mode(torch.sin):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("norm", NORMS)
def test_channels_last_and_bfloat16(norm, net, data):
    x, y = data
    expected = accuracy(net, make(PGD, norm).perturb(net, x, y), y)
    last = x.contiguous(memory_format=torch.channels_last)
    assert accuracy(net, make(PGD, norm).perturb(net, last, y), y) == pytest.approx(
        expected, abs=0.03
    )
    half = Net().eval()
    half.load_state_dict(net.state_dict())
    half = half.bfloat16()
    x_adv = make(PGD, norm).perturb(half, x.bfloat16(), y)
    assert x_adv.dtype == torch.bfloat16
    assert accuracy(half, x_adv, y) == pytest.approx(expected, abs=0.12)
    if norm == "linf":
        delta = (x_adv.float() - x.bfloat16().float()) * STD
        assert delta.abs().max() <= RADIUS[norm] + 2**-8 * 3 * 0.23  # plus one rounding


def test_flat_inputs_work_too():
    model = nn.Linear(7, 4)
    place = InputScale(mean=(0.0,) * 7, std=(1.0,) * 7)
    for norm in NORMS:
        for kind in (PGD, APGD):
            x_adv = kind(norm=norm, epsilon=0.2, pixels=place).perturb(model, torch.rand(5, 7))
            assert x_adv.shape == (5, 7)
            assert x_adv.min() >= 0


# Public libraries


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
