"""What -e and -a leave: lines, rows, pictures, curves; on a small network, in this process."""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import main
from deepvision import checkpoint
from deepvision.attacks import AutoAttack
from deepvision.evaluation import evaluator, sweep
from deepvision.models import registry


def tiny(n: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 8, stride=8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(2048, n),
    )


@pytest.fixture(scope="module")
def look(sample_root, tmp_path_factory):
    """A run of main.py that looks at a checkpoint: words -> (output, run folder)."""
    logs = tmp_path_factory.mktemp("looks") / "logs"
    folder = logs / "torch_conv_exp_2026-01-01_00-00-00"
    (folder / "models").mkdir(parents=True)
    best = folder / "models" / checkpoint.BEST
    checkpoint.save(best, {"kind": "torch_conv", "epoch": 1, "state_dict": tiny(10).state_dict()})

    def call(capsys, *words: str):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "MODEL_REGISTRY", {"torch_conv": tiny})
            words = [str(sample_root), f"--resume={best}", "--gpu=-1", "-j=0", *words]
            assert main.main(words, logs) == 0
        return capsys.readouterr().out, folder

    return call


def row_of(folder) -> dict:
    return json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])


def test_evaluation_shows_where_the_network_looks(look, capsys):
    _, folder = look(capsys, "-e", "-v")
    tags = EventAccumulator(str(folder)).Reload().Tags()["images"]
    assert {"Image/Image", "Image/Saliency", "Image/GradCAM"} <= set(tags)


def test_an_attack_by_flags_reports_its_budget_in_both_units_and_nine_diagnostics(look, capsys):
    words = ["--attack-eps=8", "--attack-steps=5", "--attack-goal=random", "--attack-restarts=2"]
    out, folder = look(capsys, "-a", "-v", *words)
    budget = "l_inf, ε = 8/255 = (0.137, 0.140, 0.139) normalised in R, G, B"
    title, last = out.splitlines()[-2:]
    assert title == f"Attacked images, random PGD, 5 steps of 4/255 with 2 restarts, {budget}:"
    assert last.startswith("******Acc@1 ")
    assert len(re.findall(r"^ *(?:ok|WARNING)  \S", out, re.M)) == 9
    row = row_of(folder)
    assert budget in row["attack"] and len(row["lights"]) == 9
    assert "Image/Strips" in EventAccumulator(str(folder)).Reload().Tags()["images"]


def test_without_flags_it_is_the_default_attack(look, capsys):
    out, folder = look(capsys, "-a")
    assert "Attacked images, ε = 0.1 normalised = (5.84, 5.71, 5.74)/255 in R, G, B:" in out
    assert "lights" not in row_of(folder)


def test_a_sweep_leaves_a_table_and_curves_that_a_second_one_replaces(look, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "STEPS", (1, 4))
    monkeypatch.setattr(sweep, "FACTORS", (1, 8))
    for _ in range(2):
        out, folder = look(capsys, "-a", "--sweep")
    table = (folder / "sweep.md").read_text()
    assert table in out and "| ε / 255 | 1 steps | 4 steps |" in table
    points = row_of(folder)["sweep"]
    assert [(p["epsilon_255"], p["steps"]) for p in points] == [
        (0, 0), *((e, s) for e in (1, 8) for s in (1, 4))
    ]  # fmt: skip
    curve = EventAccumulator(str(folder)).Reload()
    curve = [(p.step, p.value) for p in curve.Scalars("robustness/top1_4_steps")]
    fours = [(p["epsilon_255"], pytest.approx(p["top1"])) for p in points if p["steps"] in (0, 4)]
    assert curve == fours


def test_the_suite_continues_in_the_run_and_reports_one_line(look, capsys, monkeypatch):
    short = functools.partial(AutoAttack, steps=2, queries=3, targets=1)
    monkeypatch.setattr(evaluator, "AutoAttack", short)
    out, folder = look(capsys, "-a", "-v", "--attack-suite=standard", "--attack-images=8")
    (path,) = folder.glob("autoattack_standard_linf_4_8.json")
    progress = json.loads(path.read_text())["progress"]
    left = 100 * progress["fell_to"].count(None) / 8
    assert (
        out.splitlines()[-1] == f"******Acc@1 {left:.3f}" and row_of(folder)["suite_top1"] == left
    )
    assert "AutoAttack standard, l_inf, ε = 4/255" in row_of(folder)["suite"]
    again, _ = look(capsys, "-a", "--attack-suite=standard", "--attack-images=8")
    assert again.splitlines()[-2:] == out.splitlines()[-2:]  # seconds included: nothing was done


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--attack-suite=standard", "--attack-eps=0"], "epsilon = 0 changes nothing"),
        (["--attack-suite=standard", "--attack-eps=300"], "larger than the box"),
        (["--attack-norm=l2", "--attack-eps=60000"], "larger than the box"),
        (["--attack-loss=dlr", "--attack-eps=0"], "epsilon = 0 changes nothing"),
    ],
)
def test_a_radius_that_makes_no_sense_is_one_line(look, words, text, capsys):
    with pytest.raises(AssertionError):  # the exit code is not 0
        look(capsys, "-a", *words)
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ") and text in error[-1]
    assert not any("Traceback" in line for line in error)
