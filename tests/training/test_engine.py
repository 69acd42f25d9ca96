"""One epoch, one evaluation, one attack: against plain loops written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_network import make_network
from torch import nn

from deepvision.attacks.norms import InputScale
from deepvision.attacks.pgd import PGD
from deepvision.config import parse, resolve_defaults
from deepvision.models import registry
from deepvision.runtime import device
from deepvision.runtime.device import DeviceContext, prepare_model
from deepvision.runtime.meters import EpochMetrics, StepTimer
from deepvision.training import engine, optim
from deepvision.training.objectives import STEPS, Standard
from deepvision.training.trainer import make_objective
from utils import LinearWarmupCosineAnnealingLR

CPU = DeviceContext(torch.device("cpu"))
PIXELS = InputScale("normalised", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def make_batches(n=4, size=6):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 9, 9, generator=g), torch.randint(7, (size,), generator=g))
        for _ in range(n)
    ]


def make_training(model, lr=0.1, warmup=0):
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-3)
    return optimizer, LinearWarmupCosineAnnealingLR(optimizer, warmup, 20)


def train(model, batches, optimizer, scheduler, **options):
    """Learning rates of the steps, and the metrics, of an epoch."""
    metrics, rates = EpochMetrics(CPU.device), []
    parts = (model, batches, Standard(), optimizer, scheduler, CPU, metrics, StepTimer())

    def after_step(lr):
        rates.append(lr)
        return True

    engine.train_epoch(*parts, seed=5, after_step=after_step, **options)
    return rates, metrics


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_training_stops_after_the_step_that_says_so():
    model, rates = make_network(), []
    parts = (model, make_batches(), Standard(), *make_training(model), CPU)
    metrics = EpochMetrics(CPU.device)
    engine.train_epoch(
        *parts,
        metrics,
        StepTimer(),
        seed=5,
        after_step=lambda lr: rates.append(lr) or len(rates) < 2,
    )
    assert len(rates) == 2 and metrics.sums[3] == 12


def test_accuracies_equal_a_sort_of_each_row():
    torch.manual_seed(0)
    tally, hits1, hits5, losses = EpochMetrics(CPU.device), 0, 0, 0.0
    for n in (10, 3):
        logits, y = torch.randn(n, 20), torch.randint(20, (n,))
        tally.update(logits, y, F.cross_entropy(logits, y))
        pairs = zip(logits.tolist(), y.tolist(), strict=True)
        ranks = [sorted(r, reverse=True).index(r[t]) for r, t in pairs]
        hits1 += ranks.count(0)
        hits5 += sum(rank < 5 for rank in ranks)
        losses += F.cross_entropy(logits, y, reduction="sum").item()
    last, mean = tally.compute()
    assert mean.acc1 == pytest.approx(100 * hits1 / 13)
    assert mean.acc5 == pytest.approx(100 * hits5 / 13)
    assert mean.loss == pytest.approx(losses / 13)
    assert last.acc1 == pytest.approx(100 * ranks.count(0) / 3)


def test_restored_metrics_continue_as_if_never_interrupted():
    torch.manual_seed(0)
    batches = [(torch.randn(6, 9), torch.randint(9, (6,)), torch.rand(())) for _ in range(4)]
    whole, first, second = (EpochMetrics(CPU.device) for _ in range(3))
    for i, batch in enumerate(batches):
        whole.update(*batch)
        if i < 2:
            first.update(*batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[2:]:
        second.update(*batch)
    assert second.compute() == whole.compute()


def test_fewer_than_five_classes_have_a_top_5_of_100():
    tally = EpochMetrics(CPU.device)
    tally.update(torch.randn(8, 3), torch.randint(3, (8,)))
    assert tally.compute()[1].acc5 == 100


def test_training_equals_the_loop_written_out():
    ours, theirs = make_network(dropout=0.2), make_network(dropout=0.2)
    optimizer, scheduler = make_training(ours, warmup=3)
    rates, tally = train(ours, make_batches(), optimizer, scheduler, clip_grad=0.5)

    theirs.train()
    theirs.to(memory_format=torch.channels_last)
    ours_loss = 0.0
    momentum = [torch.zeros_like(p) for p in theirs.parameters()]
    for step, (x, y) in enumerate(make_batches()):
        torch.manual_seed(engine.step_seed(5, step))
        loss = F.cross_entropy(theirs(x.to(memory_format=torch.channels_last)), y)
        theirs.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        rate = 0.1 * step / 3 if step < 3 else 0.1
        with torch.no_grad():
            for p, m in zip(theirs.parameters(), momentum, strict=True):
                m.copy_(p.grad + 1e-3 * p if step == 0 else 0.9 * m + p.grad + 1e-3 * p)
                p -= rate * m
        assert rates[step] == pytest.approx(rate)
        ours_loss += loss.item() / 4
    assert tally.compute()[1].loss == pytest.approx(ours_loss, rel=1e-5)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_float32_weights(amp, monkeypatch):
    """Small gradients, too: scaled in float16, where they would all be zero."""
    plain = make_network(dropout=0.2)
    monkeypatch.setitem(device.AMP_DTYPES, "bf16", amp)  # fp16 is refused on the CPU
    halved, place = prepare_model(make_network(dropout=0.2), CPU.device, "bf16")
    small = Standard(nn.CrossEntropyLoss(weight=torch.full((7,), 1e-6), reduction="sum"))
    for model, where in ((plain, CPU), (halved, place)):
        optimizer = torch.optim.SGD(model.parameters(), 1e5)
        schedule = LinearWarmupCosineAnnealingLR(optimizer, 0, 20)
        tally = EpochMetrics(CPU.device)
        engine.train_epoch(
            model, make_batches(1), small, optimizer, schedule, where, tally, StepTimer(), seed=5
        )
    assert halved(make_batches(1)[0][0]).dtype == torch.float32
    start = make_network(dropout=0.2).state_dict()
    for name, p in plain.named_parameters():
        moved, moved16 = p - start[name], halved.get_parameter(name) - start[name]
        assert halved.get_parameter(name).dtype == torch.float32
        if p.ndim > 1:
            assert F.cosine_similarity(moved.flatten(), moved16.flatten(), dim=0) > 0.99
            assert moved16.norm().item() == pytest.approx(moved.norm().item(), rel=0.05)


@pytest.mark.parametrize("at", [[], *([f"--at={mode}"] for mode in STEPS)], ids=str)
@pytest.mark.parametrize("kind", registry.MODEL_REGISTRY)
def test_no_step_waits_for_the_device(kind, at):
    """Memory on "meta" holds nothing: to read from it fails, so does mixing it with the CPU's."""
    model, place = prepare_model(registry.create_model(kind, 10), torch.device("meta"))
    config = resolve_defaults(parse([".", *at, "--warmup=1", "--epochs=1"]), kind)
    optimizer = optim.make_optimizer(model, kind, config.lr, config.wd, config.momentum)
    scheduler = optim.make_scheduler(optimizer, config.lr, config.warmup, 1, steps=2, done=0)
    batches = [(torch.randn(2, 3, 128, 128), torch.tensor([3, 5]))] * 2
    timer = StepTimer()
    engine.train_epoch(
        model,
        batches,
        make_objective(config, 10, total_steps=2),
        optimizer,
        scheduler,
        place,
        EpochMetrics(place.device),
        timer,
        seed=1,
        clip_grad=config.clip_grad,
    )
    assert timer.step.count == 2
    metrics = EpochMetrics(place.device), EpochMetrics(place.device)
    assert engine.evaluate(model, batches, place, metrics[0], timer, metrics[1])


def test_a_first_step_that_overflows_leaves_no_trace():
    """In float16 on a GPU; the CPU has the same fused step."""
    weights = []
    for losses in ([float("inf"), 1.0, 1.0], [1.0, 1.0]):
        model = nn.Linear(500, 300, bias=False)
        nn.init.constant_(model.weight, 0.5)
        optimizer = optim.make_optimizer(model, "torch_conv", 0.1, 1e-4, 0.9, fused=True)
        scaler = make_scaler()
        for loss in losses:
            optimizer.zero_grad()
            scaler.scale(loss * model.weight.sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(model.weight)
    assert torch.equal(*weights) and not (weights[0] == 0.5).any()


class CudaParameters:
    """A model whose parameters claim to be on a GPU."""

    def __init__(self, model):
        self.model = model

    def parameters(self):
        for p in self.model.parameters():
            p.is_cuda_here = True
            yield p


def make_scaler():
    return torch.amp.GradScaler("cpu", init_scale=4.0)


def test_an_epoch_in_two_halves_equals_an_epoch_in_one_piece():
    whole, halves = make_network(dropout=0.2), make_network(dropout=0.2)
    train(whole, make_batches(), *make_training(whole))
    training = make_training(halves)
    train(halves, make_batches()[:2], *training)
    torch.rand(17)  # random draws between the halves change nothing
    train(halves, make_batches()[2:], *training)
    assert same_weights(whole, halves)


def test_mirrored_accuracy_is_of_the_averaged_logits():
    model, batches = make_network(3, dropout=0.2), make_batches(3)
    plain, mirrored = EpochMetrics(CPU.device), EpochMetrics(CPU.device)
    seen = []
    engine.evaluate(
        model, batches, CPU, plain, StepTimer(), mirrored, lambda *xy: seen.append(xy) or True
    )
    model.eval()
    expected_plain, expected_mirrored = EpochMetrics(CPU.device), EpochMetrics(CPU.device)
    with torch.no_grad():
        for (x, y), (shown, label) in zip(batches, seen, strict=True):
            assert torch.equal(x, shown) and torch.equal(y, label)
            a, b = model(x), model(torch.flip(x, dims=[-1]))
            expected_plain.update(a, y)
            expected_mirrored.update(a + b, y)
    assert plain.compute()[1] == expected_plain.compute()[1]
    assert mirrored.compute()[1] == expected_mirrored.compute()[1]


@pytest.mark.parametrize("job", ["evaluate", "attack"])
def test_looking_changes_nothing(job):
    model, batches, timer = make_network(3, dropout=0.2), make_batches(2), StepTimer()
    before = copy.deepcopy(model)
    metrics = EpochMetrics(CPU.device), EpochMetrics(CPU.device)
    if job == "evaluate":
        engine.evaluate(model, batches, CPU, metrics[0], timer)
    else:
        attack = PGD(epsilon=0.1, steps=2, pixels=PIXELS)
        engine.evaluate_under_attack(model, batches, attack.perturb, CPU, *metrics, timer)
    assert timer.step.count == 2
    assert same_weights(model, before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_attack_counts_the_same_images_before_and_after():
    model, batches = make_network(3, dropout=0.2), make_batches(3)

    def to_black(model, x, y):
        return x.fill_(-2.0)  # also spoils its input, as a student's attack may

    clean, adversarial = EpochMetrics(CPU.device), EpochMetrics(CPU.device)
    pairs, timer, expected = [], StepTimer(), EpochMetrics(CPU.device)
    engine.evaluate_under_attack(
        model, batches, to_black, CPU, clean, adversarial, timer, lambda *xs: pairs.append(xs)
    )
    engine.evaluate(model, batches, CPU, expected, StepTimer())
    assert clean.compute()[1] == expected.compute()[1]
    for (x, y), (shown, x_adv, label) in zip(batches, pairs, strict=True):
        assert torch.equal(x, shown) and (x_adv == -2).all() and torch.equal(y, label)
    black = model(torch.full((1, 3, 9, 9), -2.0)).argmax().item()
    hits = sum((y == black).sum().item() for _, y in batches)
    assert adversarial.compute()[1].acc1 == pytest.approx(100 * hits / 18)
