"""Command lines: presets, units, spellings, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reverse_attack import attack, evaluate, inference, options, train
from reverse_attack.reversal import BUDGETS
from utils import UserError

CODE = Path(__file__).resolve().parents[2] / "code"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (attack, "--norm l_3"),
        (attack, "--epsilon -1"),
        (attack, "--norm all --epsilon 8"),
        (inference, "--task ssl"),
        (train, "--task SSL --n_views 4 --cached_views 2"),
        (attack, "--gpu -2"),
        (train, "--task Clean --arch wrn-29-10"),
        (evaluate, "--protocol slow"),
    ],
)
def test_unknown_words_end_with_one_line_and_status_2(command, line, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(line.split())
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_script_runs_from_code_as_the_readme_says(tmp_path):
    command = [sys.executable, "reverse_attack/attack.py", "--data-root", str(tmp_path)]
    done = subprocess.run(command, cwd=CODE, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no CIFAR-10 in") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("spelling", ["linf", "l_inf"])
def test_flags_are_read_with_underscores_and_hyphens(spelling):
    args = inference.parse(["--norm", spelling, "--attack_iter=3", "--n_views", "2"])
    assert (args.norm, args.attack_iter, args.n_views) == ("linf", 3, 2)
    hyphens = inference.parse(["--norm", spelling, "--attack-iter=3", "--n-views", "2"])
    assert vars(hyphens) | {"command": ""} == vars(args) | {"command": ""}
    typed = f"--norm {spelling} --attack_iter=3 --n_views 2"
    assert args.command == f"python reverse_attack/inference.py {typed}"


@pytest.mark.parametrize(
    ("norm", "epsilon"), [("l2", 255), ("l2", 128), ("l1", 3060), ("linf", 256)]
)
def test_an_epsilon_in_the_published_scripts_unit_is_one_line(norm, epsilon):
    with pytest.raises(UserError, match="1/255") as error:
        options.check_epsilon(epsilon, norm, "cifar10")
    if norm == "l2":
        assert f"--epsilon {epsilon / 255:.6g}" in str(error.value)


@pytest.mark.parametrize(
    ("norm", "epsilon", "dataset"),
    [("l2", 8.0, "cifar10"), ("l1", 384.0, "miniplaces"), ("linf", 255.0, "cifar10")],
)
def test_budgets_of_larger_images_are_accepted_in_silence(norm, epsilon, dataset, capsys):
    options.check_epsilon(epsilon, norm, dataset)
    options.check_epsilon(None, norm, dataset)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(UserError, match="positive"):
        options.check_epsilon(0.0, norm, dataset)


def test_the_published_unit_is_noticed_by_the_commands_before_any_work(tmp_path, capsys):
    for command in (attack, inference):
        line = ["--norm", "l_2", "--epsilon", "255", "--data-root", str(tmp_path)]
        assert command.main(line, tmp_path) == 1
        assert "their 255 is --epsilon 1\n" in capsys.readouterr().err
    for epsilon in ("300", "128"):  # of the reversal, twice that
        assert evaluate.main(["--epsilon", epsilon, "--results", str(tmp_path)], tmp_path) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_flag_overrides_the_preset():
    paper = inference.parse(["--preset", "paper"])
    assert (paper.min_crop, paper.negatives, paper.random_start) == (0.08, "batch", True)
    assert paper.budgets == BUDGETS | {"l2": 256 / 255}
    mixed = inference.parse(["--preset=paper", "--negatives=bank", "--no-random-start"])
    assert (mixed.min_crop, mixed.negatives, mixed.random_start) == (0.08, "bank", False)
    plain = inference.parse([])
    assert (plain.min_crop, plain.random_start, plain.budgets) == (None, False, BUDGETS)
    assert train.parse(["--task=SSL", "--preset=paper"]).n_views == 2


@pytest.mark.parametrize(("flags", "device"), [("--gpu -1", "cpu"), ("--device=cpu", "cpu")])
def test_gpu_and_device_are_both_accepted(flags, device, tmp_path):
    found = []
    args = attack.parse(flags.split())
    assert options.run(lambda a: found.append((a.device, a.logs)), args, tmp_path) == 0
    assert found == [(torch.device(device), tmp_path)]
