"""PGD, FGSM and APGD on a trained network: strength, options, what they leave unchanged."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attack_toys import (
    CLASSES,
    MEAN,
    NORMS,
    PIXEL,
    RADIUS,
    SLACK,
    STD,
    Net,
    accuracy,
    batch,
    make,
    seeded,
    share_fooled,
)
from torch import nn

from deepvision.attacks import APGD, FGSM, LOSSES, PGD, InputScale, frozen_eval_mode, lp_norm
from deepvision.attacks.pgd import cosine
from student_code import PGDAttack

CODE = Path(__file__).resolve().parents[2] / "code"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [FGSM, PGD, APGD])
@pytest.mark.parametrize("unit", ["normalised", "pixel"])
def test_ball_and_box(kind, norm, unit, net, data):
    x, y = data
    for random in (False, True):
        attack = make(kind, norm, random_start=random, pixels=InputScale(unit), loss="margin")
        x_adv = attack.perturb(net, x, y)
        delta = x_adv - x if unit == "normalised" else (x_adv - x) * STD
        assert lp_norm(delta, norm).max() <= attack.epsilon * (1 + 1e-4)
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
            for s in (0.01, 0.7, 1.0, 1.4, 2)
        ]
        assert curve[0] == pytest.approx(accuracy(net, x, y), abs=SLACK / 3) and curve[0] >= 0.95
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
    """And, with one step from a random point, stronger on some of 400."""
    x, y = batch(400, 1000)
    steps = 1 if kind is PGD else 4
    common = {"steps": steps, "random_start": True, "early_stop": early_stop, "loss": "margin"}
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
def test_no_step_changes_nothing(kind, net, data):
    x, y = data
    for epsilon in (0.0, RADIUS["linf"]):
        attack = make(kind, "linf", steps=0, epsilon=epsilon)
        assert torch.equal(attack.perturb(net, x, y), x)


def test_bad_arguments_are_refused():
    for bad in ({"norm": "l3"}, {"goal": "nearest"}, {"loss": "mse"}):
        with pytest.raises(ValueError, match=f"unknown {next(iter(bad))} .*: one of"):
            PGD(**bad)
    with pytest.raises(ValueError, match="epsilon = 0 changes nothing"):
        PGD(epsilon=0.0)
    for bad in ({"epsilon": -1.0}, {"steps": -1}, {"restarts": 0}):
        with pytest.raises(ValueError, match="negative"):
            PGD(**bad)


@pytest.mark.parametrize(
    ("norm", "unit", "radius"),
    [
        ("linf", "255", 255),
        ("l2", "pixel", 768**0.5),
        ("l1", "pixel", 768),
        ("linf", "normalised", 1 / 0.224),
    ],
)
def test_an_epsilon_larger_than_the_box_is_refused(norm, unit, radius, net, data):
    largest = PGD(norm=norm, epsilon=0.999 * radius, steps=1, pixels=InputScale(unit))
    largest.perturb(net, *data)
    with pytest.raises(ValueError, match="larger than the box"):
        replace(largest, epsilon=1.01 * radius).perturb(net, *data)


def test_there_is_no_random_target_among_one_class():
    with pytest.raises(ValueError, match="at least two classes"):
        PGD(goal="random").perturb(lambda x: x.flatten(1)[:, :1], torch.zeros(2, 3, 4, 4))


def test_towards_a_target_any_other_label_is_a_success(net, data):
    x, y = data
    attack = make(APGD, "linf", loss="dlr", goal="towards_target", steps=20)
    fooled = share_fooled(net, attack.perturb(net, x, y, (y + 1) % CLASSES), y)
    exact = replace(attack, goal="target", generator=seeded())
    assert fooled.float().mean() > 0.5
    assert fooled.sum() >= share_fooled(net, exact.perturb(net, x, y, (y + 1) % CLASSES), y).sum()


class Noisy(nn.Module):
    """A randomised defence: the network on noisy images."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.generator = net, torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.net(x + 0.3 * torch.randn(x.shape, generator=self.generator))


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_there_is_no_early_stop_against_a_randomised_network(kind, net, data):
    images = []
    net_ = Noisy(net)
    net_.register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    with pytest.warns(UserWarning, match="randomised"):
        make(kind, "linf", early_stop=True, steps=5).perturb(net_, *data)
    assert images[:2] == [1, 1] and set(images[2:]) == {64} and len(images) >= 7


def test_gradients_are_means_over_eot_passes(data):
    """The loss is linear in noise of mean 0 whose sign is one pass's gradient."""
    x, y = torch.zeros(40, 3, 4, 4), torch.zeros(40, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)

    def model(x):
        weight = 1 + 4 * torch.randn(x.shape, generator=generator)
        score = (weight * x).flatten(1).sum(1)
        return torch.stack([-score, score], 1)

    moved = [
        PGD(epsilon=0.1, steps=1, loss="margin", eot=eot).perturb(model, x, y).sign().mean().item()
        for eot in (1, 100)
    ]
    assert moved[0] < 0.4 and moved[1] > 0.95  # P(N(1, 4) > 0) = 0.6, P(N(1, 0.4) > 0) = 0.994


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
    """In training mode but for one layer, with a frozen parameter and gradients."""
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


def test_it_needs_torch_only():
    script = (
        "import sys\n"
        "absent = ['cv2', 'torchvision', 'PIL', 'tensorboard', 'matplotlib', 'numpy', 'utils']\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "import deepvision.attacks\n"
        "ours = {m for m in sys.modules if m.startswith('deepvision.')}\n"
        "assert all(m.startswith('deepvision.attacks') for m in ours), ours\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=CODE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
