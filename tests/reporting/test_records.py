"""Run folders: what is read against what was written."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from report_runs import make_network

from deepvision.reporting import records
from deepvision.runtime import event_file
from deepvision.runtime.meters import Metrics
from deepvision.runtime.run_logger import RunLogger
from utils import UserError


def read_run(folder):
    return records.read_runs([folder])[0]


def test_our_folder_keeps_all_digits(our_run):
    rows = [json.loads(line) for line in (our_run / "metrics.jsonl").read_text().splitlines()]
    run = read_run(our_run)
    assert run.val_top1 == [(row["epoch"], row["val_top1_accuracy"]) for row in rows]
    assert run.best_epoch == 2 and run.last_epoch == 3
    assert run.label == run.network_name == "SimpleNet"
    assert run.data["fingerprint"] == "00c0ffee"


def test_a_course_folder_reads_as_it_was_written(course_run):
    run = read_run(course_run)
    assert run.label == "SimpleNet" and run.config == {} and run.data_folder() is None
    assert run.loss == [(i, 4 - i / 20) for i in range(0, 40, 10)]
    assert run.lr == [(i, pytest.approx(i / 400)) for i in range(0, 40, 10)]
    assert run.accuracy["top1_accuracy", "train"] == [(1, 11.5), (2, 13.25), (3, 13.25)]
    assert run.accuracy["top5_accuracy", "val"] == [(1, 41.0), (2, 42.0), (3, 43.0)]
    assert torch.equal(run.network.fc.weight, make_network(1).fc.weight)
    assert not run.network.training


def test_a_course_run_that_our_code_resumed_keeps_its_epochs(course_run, tmp_path):
    folder = shutil.copytree(course_run, tmp_path / "run")
    row = {"epoch": 3, "val_top1_accuracy": 20.0, "val_top5_accuracy": 50.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    run = read_run(folder)
    assert run.val_top1 == [(1, 10.5), (2, 12.25), (3, 20.0)] and run.best_epoch == 3
    assert math.isnan(run.at(4, "top5_accuracy")) and run.at(2, "top5_accuracy") == 42.0


def test_wall_time_leaves_out_the_time_between_two_processes(tmp_path, monkeypatch):
    """Two processes of 60 and 45 s, a day apart; points of -e and -a much later do not count."""
    now = 1e9
    monkeypatch.setattr(event_file, "time", SimpleNamespace(time=lambda: now))

    def process(start, steps, end, epoch):
        nonlocal now
        now = start
        with RunLogger(tmp_path) as logger:
            for now in steps:  # noqa: B007 - the clock that the event file reads
                logger.log_step(int(now), 1.0, 0.1)
            now = end
            logger.log_epoch(epoch, Metrics(1, 2, 3), Metrics(1, 2, 3), {})

    process(1e9, [1e9 + 5, 1e9 + 50], 1e9 + 60, epoch=1)
    process(1e9 + 86400, [1e9 + 86410], 1e9 + 86445, epoch=2)
    now = 1.1e9
    with RunLogger(tmp_path) as logger:
        logger.add_image("Image/Image", torch.zeros(3, 4, 4), 0)
        logger.add_curve_point("robustness/top1_accuracy", "5_steps", 50.0, 1)
    assert read_run(tmp_path).seconds == pytest.approx(105)


def test_runs_of_one_network_have_different_labels(our_run, course_run, tmp_path):
    twins = [tmp_path / place / "torch_conv_exp_2026-01-02_04-00-00" for place in "ab"]
    for twin in twins:
        shutil.copytree(our_run, twin)
    labels = [run.label for run in records.read_runs([our_run, course_run, *twins])]
    assert labels == [
        "SimpleNet 2026-01-02_03-04-05",
        "SimpleNet 2024-10-11_12-13-14",
        "SimpleNet 2026-01-02_04-00-00",
        "SimpleNet 2026-01-02_04-00-00 (2)",
    ]


def test_adversarial_training_is_part_of_the_label(our_run, tmp_path):
    folder = shutil.copytree(our_run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["arguments"]["at"] = "free"
    (folder / "config.json").write_text(json.dumps(config))
    assert read_run(folder).label == "SimpleNet + free"


@pytest.mark.parametrize("start", [".", "code", "logs/.."])
def test_the_data_folder_is_found_wherever_main_py_was_started(our_run, tmp_path, start):
    folder = shutil.copytree(our_run, tmp_path / "logs" / "run")
    (tmp_path / "code").mkdir()
    (tmp_path / start / "scenes" / "images").mkdir(parents=True)
    run = read_run(folder)
    run.config["arguments"] = {"data_folder": "scenes"}
    assert run.data_folder().samefile(tmp_path / start / "scenes")


def spoil(name, text):
    return lambda folder: (folder / name).write_text(text)


BROKEN = [
    (spoil("metrics.jsonl", '{"epoch": 1'), r"metrics\.jsonl is damaged"),
    (spoil("metrics.jsonl", "[1]\n"), r"metrics\.jsonl is damaged: expected an object"),
    (spoil("metrics.jsonl", '{"epoch": 1, "val_top1_accuracy": "x"}'), r"is no row of it"),
    (spoil("config.json", "\0"), r"config\.json is damaged"),
    (lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff"), r"cannot read .*metrics"),
    (shutil.rmtree, r"there is no run folder"),
    (lambda f: [shutil.rmtree(f), f.mkdir()], r"holds no validation accuracy: it is no run folder"),
]


@pytest.mark.parametrize(("spoilt", "message"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_folder_is_an_error_or_skipped_next_to_a_good_one(
    our_run, tmp_path, spoilt, message
):
    folder = shutil.copytree(our_run, tmp_path / "run")
    spoilt(folder)
    with pytest.raises(UserError, match=message):
        read_run(folder)
    errors = []
    (run,) = records.read_runs([folder, our_run], errors.append)
    assert run.folder == our_run and len(errors) == 1


def test_a_folder_named_twice_is_an_error(our_run):
    with pytest.raises(UserError, match="is named twice"):
        records.read_runs([our_run, Path(f"{our_run}/models/..")])
