"""attack.py: what its sets hold, and every flag."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from reverse_toys import CLASSES, EPSILONS, refused, run, set_of, weights, x_of

from deepvision import checkpoint
from deepvision.attacks import PGD, AutoAttack, lp_norm
from reverse_attack import attack, attack_sets, classifier, inference, options
from reverse_attack.data import list_images
from reverse_attack.reversal import input_scale


@pytest.mark.parametrize("norm", EPSILONS)
def test_attacked_images_fill_their_ball_within_valid_pixels(root, norm):
    (name, meta), plain = set_of(root, norm), norm.replace("_", "")
    found = attack_sets.load(root, plain, name, meta)
    x_adv, y = found.x, found.y
    clean = list_images("cifar10", root, "test").sample(0, 64)
    x = clean.x / 255
    assert torch.equal(y, clean.y)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    unit = 255 if norm == "l_inf" else 1
    lengths = lp_norm(x_adv - x, plain).flatten() * unit
    assert lengths.max() <= EPSILONS[norm] * (1 + 1e-4)
    assert lengths.median() >= 0.95 * EPSILONS[norm]
    assert meta["largest_norm"] == pytest.approx(lengths.max().item(), rel=1e-3)
    assert (meta["epsilon"], meta["iterations"], meta["loss"]) == (EPSILONS[norm], 5, "ce")
    assert meta["attacked_accuracy"] <= meta["clean_accuracy"]


def test_accuracy_falls_with_epsilon_to_almost_nothing(root, tmp_path):
    found = []
    for epsilon in (4, 16, 64):
        line = f"--norm l_inf --attack-iters 10 --epsilon {epsilon} --savepath {tmp_path}"
        assert run(root, attack, line) == 0
        metas = [meta for _, meta in attack_sets.read_records(tmp_path / "pgd" / "l_inf")]
        found.append(next(m["attacked_accuracy"] for m in metas if m["epsilon"] == epsilon))
    assert metas[0]["clean_accuracy"] > 70 and found[0] <= metas[0]["clean_accuracy"]
    assert found == sorted(found, reverse=True)
    assert found[-1] <= 5


def test_every_attack_flag_is_honoured(root, tmp_path, capsys):
    line = "--norm l_2 --attack-iters 3 --attack-type cw --restarts 2 --eval --pgd-alpha 0.1"
    assert run(root, attack, f"{line} --batch-size 5 --savepath {tmp_path}", 12) == 0
    assert "cannot reach" in capsys.readouterr().err
    name, meta = set_of(tmp_path, "l_2", 3)
    assert name.startswith("l_2_3_cw_eps0.5_")
    assert (meta["loss"], meta["restarts"], meta["early_stop"]) == ("margin", 2, True)
    assert (meta["step_size"], meta["images"]) == (0.1, 12)
    assert run(root, inference, f"--norm l_2 --savepath {tmp_path}", 12) == 0
    assert f"{meta['attacked_accuracy']:.1f} [" in (out := capsys.readouterr().out)
    assert f"Attack set: {name}" in out


def test_same_seed_same_set_another_seed_another(root, tmp_path):
    sets = []
    for i, seed in enumerate((3, 3, 4)):
        line = f"--norm l_inf --attack-iters 1 --seed {seed} --savepath {tmp_path / str(i)}"
        assert run(root, attack, line, 8) == 0
        sets.append(x_of(tmp_path / str(i), "l_inf", 1))
    assert np.array_equal(sets[0], sets[1]) and not np.array_equal(sets[0], sets[2])


def test_the_classifier_stays_as_it_was(root):
    """The commands leave the file alone; its hash is in the record of every set."""
    sums = {set_of(root, norm)[1]["checkpoint_sha256"] for norm in EPSILONS}
    content = checkpoint.load(weights(root, "ssl"))
    assert sums == {content["classifier_sha256"]} == {classifier.sha256(weights(root))}


def test_the_record_counts_forward_passes_per_image(root, tmp_path):
    """One per step, and with --eval one before the first to see what is still correct."""
    line = f"--norm l_inf --attack-iters 4 --batchsize 5 --savepath {tmp_path}"
    assert run(root, attack, line, 12) == 0
    meta = set_of(tmp_path, "l_inf", 4)[1]
    assert meta["forward_passes_per_image"] == pytest.approx(4)
    assert 0 < meta["seconds_per_image"] < 60


def test_the_papers_preset_takes_its_l_2_budget_unless_epsilon_is_given(root, tmp_path):
    line = f"--preset paper --norm l2 --attack-iters 1 --savepath {tmp_path}"
    assert run(root, attack, line, 4) == 0
    assert set_of(tmp_path, "l_2", 1)[1]["epsilon"] == pytest.approx(256 / 255)
    assert run(root, attack, f"{line.replace('1 ', '2 ')} --epsilon 0.25", 4) == 0
    assert set_of(tmp_path, "l_2", 2)[1]["epsilon"] == 0.25


def test_the_suite_leaves_what_autoattack_leaves_and_continues_when_stopped(
    root, tmp_path, capsys, monkeypatch
):
    short = partial(AutoAttack, steps=2, queries=3, targets=1)
    monkeypatch.setattr(attack, "AutoAttack", short)
    line = f"--attack-suite standard --norm l2 --batch-size 8 --savepath {tmp_path}"
    assert run(root, attack, line, 16) == 0
    (path,) = (tmp_path / "pgd" / "l_2").iterdir()
    found = json.loads(path.read_text())["progress"]["fell_to"]
    model = classifier.load(weights(root), "narrow", CLASSES).model
    images = list_images("cifar10", root, "test").sample(0, 16)
    suite = short(norm="l2", epsilon=0.5, pixels=input_scale("l2"), batch_size=8)
    assert found == suite.run(model, images.x / 255, images.y).fell_to
    table = capsys.readouterr().out
    assert "| square | " in table and "AutoAttack standard, l_2, ε = 127.5/255" in table
    assert run(root, attack, line, 16) == 0  # nothing is left to do
    assert capsys.readouterr().out == table


@pytest.mark.parametrize(
    "flag", ["--attack-iters 5", "--restarts 1", "--eval", "--attack-type pgd", "--pgd-alpha 0"]
)
def test_the_suite_refuses_the_flags_of_a_single_attack(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        attack.main(["--attack-suite", "standard", *flag.split()])
    assert stop.value.code == 2
    assert f"leave {flag.split()[0]} out" in capsys.readouterr().err


@pytest.mark.parametrize("suite", ["", "--attack-suite standard"])
def test_an_epsilon_beyond_the_box_is_one_line(suite, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(options, "PUBLISHED_UNITS", {})
    line = f"--norm l2 --epsilon 300 --savepath {tmp_path} {suite}"
    assert "larger than the box" in refused(capsys, run(root, attack, line, 4))


def test_no_steps_are_none():
    args = attack.parse(["--attack-iters", "0"])
    assert (args.attack_iters, args.restarts, args.eval) == (0, 1, False)


@pytest.mark.parametrize(
    ("norm", "epsilon", "kind"),
    [
        ("l1", 60.0, "L1PGD"),
        ("l1", 60.0, "SparseL1DescentAttack"),
        ("l2", 2.0, "L2PGD"),
    ],
)
def test_our_attacks_are_at_least_as_strong_as_foolboxs(root, norm, epsilon, kind):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is an optional dependency")
    model = classifier.load(weights(root), "narrow", CLASSES).model
    images = list_images("cifar10", root, "test").sample(0)
    x, y = images.x / 255, images.y
    options = {"rel_stepsize": 0.125, "steps": 20, "random_start": norm == "l2"}
    theirs = getattr(foolbox.attacks, kind)(**options)
    public = foolbox.PyTorchModel(model, bounds=(0, 1))
    _, x_theirs, _ = theirs(public, x, y, epsilons=epsilon)
    pixels, generator = input_scale(norm), torch.Generator().manual_seed(0)
    same = {"norm": norm, "epsilon": epsilon, "steps": 20, "random_start": norm == "l2"}
    ours = PGD(**same, pixels=pixels, generator=generator)
    left, expected = (
        (model(v).argmax(1) == y).float().mean() for v in (ours.perturb(model, x, y), x_theirs)
    )
    print(f"{norm}: foolbox's {kind} leaves {expected:.3f}, ours {left:.3f}")
    assert left <= expected + 2 / len(y)
