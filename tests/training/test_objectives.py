"""Adversarial training: each mode against its paper's loop written out, the guard, the cost."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from small_network import make_network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import main
from deepvision import checkpoint
from deepvision.attacks.norms import InputScale
from deepvision.attacks.pgd import FGSM, PGD
from deepvision.models import registry
from deepvision.runtime.device import DeviceContext
from deepvision.runtime.meters import EpochMetrics, StepTimer
from deepvision.runtime.run_dir import latest_run
from deepvision.training import engine, trainer
from deepvision.training.objectives import (
    STEPS,
    AdversarialTraining,
    Standard,
    divergence,
)
from utils import LinearWarmupCosineAnnealingLR

CPU = DeviceContext(torch.device("cpu"))
MEAN, STD = (0.5, 0.4, 0.6), (0.25, 0.2, 0.3)
PIXELS = InputScale("255", MEAN, STD)
RATE = 0.05


def make_batches(n: int = 3, size: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    pixels = torch.rand(n, size, 3, 9, 9, generator=g)
    return list(zip((pixels - mean) / std, torch.randint(7, (n, size), generator=g), strict=True))


def train(model: nn.Module, batches: list, first: int = 0, objective=None) -> EpochMetrics:
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    scheduler = LinearWarmupCosineAnnealingLR(optimizer, 0, 10**9)
    scheduler.last_epoch = first
    tally = EpochMetrics(CPU.device)
    objective = objective or Standard()
    parts = (model, batches, objective, optimizer, scheduler, CPU, tally, StepTimer())
    engine.train_epoch(*parts, seed=5)
    return tally


def descend(model: nn.Module, loss: torch.Tensor) -> None:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            p -= RATE * g


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023


def written_out(mode: str, model: nn.Module, x, y, epsilon: float) -> None:
    """One batch of each paper's algorithm; the attacks themselves are tested in tests/attacks/."""
    scale = 255 * torch.tensor(STD).view(1, 3, 1, 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    assert torch.rand(()) < 1  # the draw that decides whether this batch is attacked
    if mode == "free":
        lo, hi = ((bound - mean) / std - x for bound in (0, 1))
        lo, hi = (lo * scale).clamp(-epsilon, 0), (hi * scale).clamp(0, epsilon)
        delta = lo + (hi - lo) * torch.rand_like(x)
        for _ in range(STEPS[mode]):
            delta = delta.detach().requires_grad_(True)
            loss = F.cross_entropy(model(x + delta / scale), y)
            (g,) = torch.autograd.grad(loss, delta, retain_graph=True)
            descend(model, loss)
            delta = torch.minimum(torch.maximum(delta + epsilon * g.sign(), lo), hi)
        return
    options = {"epsilon": epsilon, "random_start": True, "pixels": PIXELS}
    if mode == "trades":
        with torch.no_grad():
            p = copy.deepcopy(model).eval()(x).softmax(1)

        def distance(logits, *_):
            return (p * (p.log() - logits.log_softmax(1))).sum(1)

        x_adv = PGD(steps=STEPS[mode], loss=distance, **options).perturb(model, x, y)
        clean = model(x)
        p, q = clean.softmax(1), model(x_adv).log_softmax(1)
        descend(model, F.cross_entropy(clean, y) + 6 * (p * (p.log() - q)).sum(1).mean())
        return
    attack = FGSM(**options) if mode == "fgsm-rs" else PGD(steps=STEPS[mode], **options)
    descend(model, F.cross_entropy(model(attack.perturb(model, x, y)), y))


@pytest.mark.parametrize("mode", STEPS)
def test_each_mode_is_its_papers_loop(mode):
    ours, theirs = make_network(), make_network()
    adversary = AdversarialTraining(mode=mode, epsilon=8, steps=STEPS[mode], scale=PIXELS)
    train(ours, make_batches(), objective=adversary)
    theirs.train()
    for step, (x, y) in enumerate(make_batches()):
        torch.manual_seed(engine.step_seed(5, step))
        written_out(mode, theirs, x, y, 8)
    assert_same(ours, theirs)


@pytest.mark.parametrize("mode", STEPS)
def test_an_epoch_in_two_halves_is_an_epoch_in_one_piece(mode):
    whole, halves = make_network(), make_network()
    objective = AdversarialTraining(mode=mode, steps=2, scale=PIXELS, eps_warmup=(0, 3))
    train(whole, make_batches(4), objective=objective)
    train(halves, make_batches(4)[:2], objective=objective)
    torch.rand(17)  # random draws between the halves change nothing
    train(halves, make_batches(4)[2:], first=2, objective=objective)
    for a, b in zip(whole.state_dict().values(), halves.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["pgd", "fgsm-rs"])
def test_attacks_of_no_size_train_as_no_attack_does(mode):
    """An attack that left gradients or BatchNorm statistics behind would change the weights."""
    clean, attacked = make_network(), make_network()
    adversary = AdversarialTraining(mode=mode, epsilon=1e-9, scale=PIXELS)
    train(clean, make_batches())
    train(attacked, make_batches(), objective=adversary)
    assert_same(clean, attacked)


def test_steps_before_the_warmup_are_standard_training():
    clean, attacked = make_network(), make_network()
    train(clean, make_batches())
    later = AdversarialTraining(scale=PIXELS, eps_warmup=(3, 9))
    train(attacked, make_batches(), objective=later)
    for a, b in zip(clean.state_dict().values(), attacked.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_attack_prob_clean_mix_and_eps_warmup():
    model, seen = make_network(), []
    x, y = make_batches(1)[0]
    x = torch.zeros_like(x)  # far from black and white
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def moved(step, **options):
        """By how many of 255 the images that the loss is of were moved."""
        objective = AdversarialTraining(epsilon=8, steps=2, scale=PIXELS, **options)
        torch.manual_seed(step)
        assert objective.begin_batch(step) == 1
        objective(model, x, y)
        return ((seen[-1] - x) * PIXELS.scale(x)).abs().max().item()

    ramp = [moved(step, eps_warmup=(10, 20)) for step in (0, 9, 10, 14, 19, 99)]
    assert ramp == pytest.approx([0, 0, 0.8, 4, 8, 8], rel=1e-3)
    assert moved(5, clean_mix=0.5) == pytest.approx(4, rel=1e-3)
    assert 0.2 < sum(moved(step, attack_prob=0.3) > 0 for step in range(200)) / 200 < 0.4


@pytest.mark.parametrize("mode, forwards, backwards", [("fgsm-rs", 2, 2), ("free", 2, 2)])
def test_cheap_modes_cost_two_passes(mode, forwards, backwards):
    """Wong et al. and Shafahi et al. promise twice the cost of standard training."""
    model, passes = make_network(), [0, 0]
    model[0].register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    model[-1].register_full_backward_hook(lambda *_: passes.__setitem__(1, passes[1] + 1))
    adversary = AdversarialTraining(mode=mode, steps=STEPS[mode], scale=PIXELS)
    train(model, make_batches(1), objective=adversary)
    assert passes == [forwards, backwards]


def test_trades_is_finite_where_the_clean_softmax_underflows():
    """yaodongyu/TRADES, issue 30."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    net[1].weight.data.mul_(60)
    x, y = torch.randn(8, 3, 2, 2), torch.randint(5, (8,))
    assert (net(x).softmax(1) == 0).any()
    objective = AdversarialTraining(mode="trades", epsilon=4.0, steps=2)
    objective.begin_batch(0)
    _, loss = objective(net, x, y)
    loss.backward()
    assert loss.isfinite() and net[1].weight.grad.isfinite().all()


def test_divergence_is_torchs():
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 7)
    p, q = torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(divergence(b, a.log_softmax(1)), expected)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="pgd, fgsm-rs, free, trades"):
        AdversarialTraining(mode="fast")


def test_the_standard_objective_is_the_criterion():
    model, (x, y) = make_network(), make_batches(1)[0]
    logits, loss = Standard()(model, x, y)
    assert torch.equal(loss, F.cross_entropy(logits, y))


# A whole run, in this process


def tiny(n: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(2048, n))


@pytest.fixture
def run(sample_root, tmp_path, monkeypatch, capsys):
    """Words of the command line -> (output, content of checkpoint.pth.tar, run folder)."""
    monkeypatch.setattr(registry, "MODEL_REGISTRY", {"torch_conv": tiny})

    def call(*words: str):
        common = [str(sample_root), "--gpu=-1", "-j=0", "-b=32", "--warmup=1", "--at=fgsm-rs"]
        assert main.main([*common, *words], tmp_path / "logs") == 0
        folder = latest_run(tmp_path / "logs", ["torch_conv"])
        return (
            capsys.readouterr().out,
            checkpoint.load(folder / "models/checkpoint.pth.tar"),
            folder,
        )

    return call


@pytest.fixture
def weights_file(tmp_path) -> str:
    content = {"kind": "torch_conv", "epoch": 7, "state_dict": tiny(10).state_dict()}
    checkpoint.save(tmp_path / "weights.pth.tar", content)
    return f"--weights={tmp_path / 'weights.pth.tar'}"


def test_a_collapse_is_told_and_undone_and_robust_accuracy_is_kept(run, weights_file, monkeypatch):
    """Figures from outside, as a true collapse takes minutes."""
    figures, weights = iter([30.0, 40.0, 35.0, 3.0]), []

    def measured(model, *_):
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(figures)

    monkeypatch.setattr(trainer, "accuracy_under_attack", measured)
    out, last, folder = run("--epochs=4", "--lr=0.02", "--best-by=robust", weights_file)
    assert len(re.findall("^Robust accuracy", out, re.M)) == 4
    assert "robust accuracy fell from 40.0; the weights of epoch 3 are restored" in out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["robust_top1_accuracy"] for row in rows] == [30.0, 40.0, 35.0, 3.0]
    assert [row["collapsed"] for row in rows] == [False, False, False, True]
    curve = EventAccumulator(str(folder)).Reload()
    points = [(p.step, p.value) for p in curve.Scalars("data/robust_top1_accuracy")]
    assert points == [(1, 30.0), (2, 40.0), (3, 35.0), (4, 3.0)]
    best = checkpoint.load(folder / "models/model_best.pth.tar")
    assert (best["epoch"], best["best_robust"], last["best_robust"]) == (2, 40.0, 40.0)
    for name in best["state_dict"]:
        assert torch.equal(best["state_dict"][name], weights[1][name])
        assert torch.equal(last["state_dict"][name], weights[2][name])
    assert (last["watchdog"]["best"], last["watchdog"]["epoch"]) == (40.0, 3)
    memory = last["optimizer"]["state"].values()
    assert memory and not any(m["momentum_buffer"].any() for m in memory)  # into the collapse


def test_weights_begin_a_run_and_stay_what_they_were_at_a_rate_of_0(run, weights_file):
    out, last, folder = run("--epochs=1", "--lr=0", weights_file)
    given = checkpoint.load(weights_file.partition("=")[2])
    assert all(torch.equal(v, last["state_dict"][k]) for k, v in given["state_dict"].items())
    assert last["epoch"] == 1 and len(list(folder.parent.iterdir())) == 1
