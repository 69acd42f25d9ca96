"""checks/runs.py: run folders, ours and the course's, against the table of thresholds."""

from __future__ import annotations

import json

import pytest
import torch
from answers import ROOT
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import student_code
from checks import runs

SHARED = ROOT.parent / "shared" / "runs"
OWN = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))


def make_run(folder, top1, network, epochs=3, pgd=False, robust=None, arch="simplenet"):
    """As our code leaves it; `top1` is reached in the last epoch."""
    (folder / "models").mkdir(parents=True)
    rows = [
        {"epoch": e, "train_loss": 4.0 / e, "val_top1_accuracy": top1 * e / epochs}
        for e in range(1, epochs + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"arguments": {"pgd": pgd, "at": None}}))
    if robust is not None:
        row = {"clean_top1": top1, "attacked_top1": robust}
        (folder / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    save(folder, network, arch)


def save(folder, network, arch):
    content = {"epoch": 3, "model_arch": arch, "state_dict": network.state_dict(), "best_acc1": 1.0}
    torch.save(content, folder / "models" / "model_best.pth.tar")


def make_course_run(folder, top1, network, arch, epochs=3):
    """Event files and a checkpoint, as the course's code leaves them."""
    (folder / "models").mkdir(parents=True)
    writer = SummaryWriter(folder)
    for epoch in range(1, epochs + 1):
        writer.add_scalar("data/training_loss", 4.0 / epoch, 10 * epoch)
        for name in ("top1", "top5"):
            values = {"train": top1, "val": top1 * epoch / epochs}
            writer.add_scalars(f"data/{name}_accuracy", values, epoch)
    writer.close()
    save(folder, network, arch)


@pytest.fixture(scope="module")
def resnet():
    return pytest.importorskip("torchvision").models.resnet18(num_classes=100)


@pytest.fixture
def logs(tmp_path, resnet):
    """Runs for all points: the plain network, its robust twin, and the course's others."""
    simple = student_code.SimpleNet(num_classes=100)
    make_run(tmp_path / "torch_conv_exp_1", 41.0, simple, robust=0.2)
    make_run(tmp_path / "torch_conv_exp_2", 30.0, simple, pgd=True, robust=9.0)
    make_course_run(tmp_path / "exp_2025-10-13 23:30:58", 39.5, simple, "CustomCNN")
    make_course_run(tmp_path / "exp_2025-10-14 23:30:58", 55.0, resnet, "ResNet")
    make_run(tmp_path / "own_exp_1", 44.0, OWN)
    return tmp_path


def scores(root):
    return {result.check.name: result.score for result in runs.grade(root)}


def problem_of(root, name):
    return next(r.problem for r in runs.grade(root) if r.check.name.startswith(name))


def test_runs_for_all_points_get_four_and_the_bonus(logs):
    assert sum(check.points for check in runs.CHECKS) == 4 + 2
    assert sum(scores(logs).values()) == 6


def test_a_folder_without_runs_gets_nothing_and_no_folder_a_line(tmp_path):
    assert sum(scores(tmp_path).values()) == 0
    assert "there is no run of simplenet" in problem_of(tmp_path, "SimpleNet")
    assert "there is no folder" in problem_of(tmp_path / "gone", "SimpleNet")


def test_thresholds_are_those_of_the_table(tmp_path, resnet):
    simple = student_code.SimpleNet(num_classes=100)
    make_run(tmp_path / "torch_conv_exp_1", 39.9, simple)
    make_run(tmp_path / "custom_conv_exp_1", 19.0, simple)
    make_run(tmp_path / "resnet18_exp_1", 49.9, resnet)
    make_run(tmp_path / "own_exp_1", 39.0, OWN)
    assert sum(scores(tmp_path).values()) == 0
    assert "39.90 % in 60 epochs, expected 40 %" in problem_of(tmp_path, "SimpleNet")
    assert "expected above 39.90 %" in problem_of(tmp_path, "own network")
    assert "expected 20 % in 10 epochs" in problem_of(tmp_path, "own convolution")


def test_what_comes_after_sixty_epochs_does_not_count(tmp_path):
    make_run(tmp_path / "torch_conv_exp_1", 41.0, student_code.SimpleNet(num_classes=9), epochs=90)
    assert "27.33 % in 60 epochs" in problem_of(tmp_path, "SimpleNet")


@pytest.mark.parametrize(("robust", "points"), [(5.1, 0.0), (5.3, 2.0), (None, 0.0)])
def test_the_bonus_is_five_points_of_robust_accuracy(tmp_path, robust, points):
    simple = student_code.SimpleNet(num_classes=10)
    make_run(tmp_path / "torch_conv_exp_1", 41.0, simple, robust=0.2)
    make_run(tmp_path / "torch_conv_exp_2", 30.0, simple, pgd=True, robust=robust)
    assert scores(tmp_path)["bonus: adversarial training"] == points


def test_broken_and_foreign_files_are_named_and_harm_nothing(logs):
    (logs / "notes").mkdir()
    broken = logs / "exp_broken"
    broken.mkdir()
    (broken / "events.out.tfevents.1.x").write_bytes(b"\x00" * 50)
    (logs / "torch_conv_exp_1" / "models" / "checkpoint.pth.tar").write_text("no checkpoint")
    results = runs.grade(logs)
    assert sum(result.score for result in results) == 6
    assert ["exp_broken is skipped" in remark for remark in results[0].remarks] == [True]


def test_a_pickle_in_a_run_folder_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "model.pth.tar")
    assert runs.load(tmp_path / "model.pth.tar") == {}
    assert not (tmp_path / "written").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the runs of ../shared are not here")
def test_the_shared_runs():
    found = scores(SHARED)
    assert found["SimpleNet trained"] == found["own network trained"] == 1
    assert found["pre-trained network trained"] == found["own convolution trained"] == 0
