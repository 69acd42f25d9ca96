"""Run folders: made, found, and distinguished from other folders."""

import json

import pytest

from deepvision.runtime.run_dir import (
    latest_run,
    lock_run,
    new_run_dir,
    run_dir_of,
    run_dirs,
    run_launched_as,
)
from utils import UserError


def make(logs, name):
    (logs / name / "models").mkdir(parents=True)
    return logs / name


def test_the_latest_run_is_the_one_that_started_last_and_only_folders_count(tmp_path):
    old = make(tmp_path, "vit_exp_2026-01-01_00-00-00")
    new = make(tmp_path, "torch_conv_exp_2026-01-02_00-00-00")
    (tmp_path / "vit_exp_2099-01-01_00-00-00.zip").write_bytes(b"")
    (tmp_path / "vit_exp_2099-01-01_00-00-01").write_bytes(b"")
    assert run_dirs(tmp_path, ["vit", "torch_conv"]) == [new, old]
    assert latest_run(tmp_path, ["vit"]) == old
    assert latest_run(tmp_path, ["resnet18"]) is None


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    first, second = (new_run_dir(tmp_path / "logs", "vit") for _ in range(2))
    assert first != second and (second / "models").is_dir()


def test_a_checkpoint_outside_the_logs_has_no_run_folder(tmp_path):
    run = make(tmp_path / "logs", "vit_exp_2026-01-01_00-00-00")
    assert run_dir_of(run / "models" / "checkpoint.pth.tar", tmp_path / "logs") == run
    assert run_dir_of(run / "checkpoint.pth.tar", tmp_path / "logs") is None
    # the layout of 2022: models/ in the project's root
    assert run_dir_of(tmp_path / "models" / "checkpoint.pth.tar", tmp_path / "logs") is None


def test_the_run_of_a_launch_is_found_by_its_record(tmp_path):
    for name, launch in (
        ("vit_exp_2026-01-01_00-00-00", "a"),
        ("vit_exp_2026-01-02_00-00-00", "b"),
    ):
        (make(tmp_path, name) / "config.json").write_text(json.dumps({"launch": launch}))
    (make(tmp_path, "vit_exp_2026-01-03_00-00-00") / "config.json").write_text("{")
    assert run_launched_as(tmp_path, "a").name == "vit_exp_2026-01-01_00-00-00"
    assert run_launched_as(tmp_path, "c") is None


def test_logs_that_are_a_file_are_refused(tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(UserError, match="cannot make the run folder"):
        new_run_dir(tmp_path / "logs", "vit")


def test_a_lock_of_this_process_can_be_taken_again(tmp_path):
    """POSIX locks belong to a process; test_resume.py has two processes."""
    with lock_run(tmp_path), lock_run(tmp_path):
        assert (tmp_path / ".lock").exists()
