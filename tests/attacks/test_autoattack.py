"""AutoAttack: its set of attacks, the same result when interrupted, what it refuses."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from attack_toys import NORMS, PIXEL, RADIUS, accuracy, make
from torch import nn

from deepvision.attacks import APGD, AutoAttack, InputScale, Progress
from deepvision.attacks.autoattack import other_labels


def suite(norm: str = "linf", **options) -> AutoAttack:
    """A short one."""
    defaults = {"epsilon": 0.8 * RADIUS.get(norm, 1), "steps": 8, "queries": 20, "targets": 2}
    return AutoAttack(norm=norm, pixels=PIXEL, batch_size=24, **(defaults | options))


def test_the_standard_set_is_the_papers():
    stages = AutoAttack(epsilon=8).stages(10)
    names = Counter(stage.name for stage in stages)
    assert names == {"apgd-ce": 1, "apgd-t (dlr)": 9, "fab-t": 9, "square": 1}
    assert list(dict.fromkeys(names)) == ["apgd-ce", "apgd-t (dlr)", "fab-t", "square"]
    assert [s.rank for s in stages] == [None, *range(9), *range(9), None]
    assert {s.attack.steps for s in stages} == {100, 4999}
    assert stages[-1].attack.p == 0.8
    assert not any(getattr(s.attack, "multi_epsilon", False) for s in stages)
    l1 = AutoAttack(norm="l1", epsilon=3060).stages(10)
    names = Counter(stage.name for stage in l1)
    assert names == {"apgd-ce": 1, "apgd-t (dlr)": 5, "fab-t": 9, "square": 1}
    assert all(s.attack.multi_epsilon for s in l1[:6]) and l1[0].attack.restarts == 5


def test_the_rand_set_averages_gradients_and_never_stops_early():
    stages = AutoAttack(version="rand").stages(10)
    assert [(s.attack.loss, s.attack.eot, s.attack.early_stop) for s in stages] == [
        ("ce", 20, False),
        ("dlr", 20, False),
    ]


def test_few_classes_use_the_margin_and_fewer_targets():
    names = Counter(stage.name for stage in AutoAttack().stages(3))
    assert names == {"apgd-ce": 1, "apgd-t (margin)": 2, "fab-t": 2, "square": 1}


def test_other_labels_are_ranked_without_the_true_one():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0]])
    assert other_labels(logits, torch.tensor([1, 1])).tolist() == [[2, 0], [0, 2]]


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_at_least_as_strong_as_its_first_attack(norm, net, data):
    x, y = data
    found = suite(norm).run(net, x, y)
    assert found.done == found.units == (1 + 2 + 2 + 1) * 3
    assert found.clean == round(accuracy(net, x, y) * 64)
    alone = make(APGD, norm, epsilon=0.8 * RADIUS[norm], steps=8, multi_epsilon=norm == "l1")
    left = accuracy(net, alone.perturb(net, x, y), y)
    assert 0 < found.robust / 64 <= left + 0.05
    assert found.accuracy == 100 * found.robust / 64


def test_it_counts_the_forward_passes(net, data):
    images = []
    hook = net.register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    found = suite().run(net, *data)
    hook.remove()
    assert found.forward_passes == sum(images) - 2  # less the two of the test for randomness
    assert found.seconds > 0


def test_the_passes_left_are_those_of_images_that_no_attack_changes(data):
    x, y = data

    def stubborn(v):
        return torch.eye(6)[y[: len(v)]] + 0 * v.flatten(1)[:, :6]

    seen = []
    attack = replace(suite(), batch_size=64)
    found = attack.run(stubborn, x, y, on_progress=lambda p, _: seen.append(asdict(p)))
    assert found.robust == 64 and found.passes_left == 0
    for early, late in zip(seen, seen[1:], strict=False):
        done = late["forward_passes"] - early["forward_passes"]
        expected = early["passes_left"] - late["passes_left"]
        assert expected <= done <= expected + 5 * 64  # the passes before and after the steps


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def in_one_go(net, data) -> Progress:
    return suite().run(net, *data)


@pytest.mark.parametrize("after", [1, 5, 17])
def test_an_interrupted_evaluation_ends_as_one_in_one_go(after, in_one_go, net, data):
    expected, saved = in_one_go, []

    def interrupt(progress: Progress, name: str) -> None:
        saved.append(asdict(progress))
        if progress.done == after:
            raise Stop

    with pytest.raises(Stop):
        suite().run(net, *data, on_progress=interrupt)
    found = suite().run(net, *data, Progress(**saved[-1]))
    assert found.fell_to == expected.fell_to and found.done == expected.done
    assert found.forward_passes == expected.forward_passes


class Noisy(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))


@pytest.mark.filterwarnings("ignore:this model is randomised. the attack does not stop early")
def test_a_randomised_network_is_noticed_and_has_its_version(net, data):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="use the version 'rand'"):
        suite(steps=1, queries=2).run(Noisy(net), *data)
    found = suite(version="rand", eot=3).run(Noisy(net), *data)
    assert found.attacks == ["apgd-ce", "apgd-dlr"] and found.robust < 0.7 * found.clean


def test_bad_input_is_refused_in_one_line(net, data):
    x, y = data
    for bad, text in (
        ({"version": "plus"}, "unknown version 'plus'"),
        ({"norm": "l3"}, "unknown norm 'l3'"),
        ({"epsilon": 0.0}, "epsilon = 0"),
    ):
        with pytest.raises(ValueError, match=text):
            suite(**bad)
    with pytest.raises(ValueError, match="no images"):
        suite().run(net, x[:0], y[:0])
    with pytest.raises(ValueError, match="larger than the box"):
        suite(epsilon=1.1).run(net, x, y)
    with pytest.raises(ValueError, match="is of 5 images"):
        suite().run(net, x, y, Progress([None] * 5))


def test_inputs_outside_the_stated_range_are_refused_and_narrow_ones_warned_of(net, data):
    x, y = data
    pixels = x * PIXEL.per_channel(PIXEL.std, x) + PIXEL.per_channel(PIXEL.mean, x)
    unit = InputScale("pixel", (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        replace(suite(), pixels=unit).run(net, x, y)
    with pytest.warns(UserWarning, match=r"a small part of \[0, 1\]"):
        suite(steps=1, queries=2).run(net, pixels, y)
    assert unit.misfit(pixels) is None
