"""The records of a run: three TensorBoard runs, rows, and what a resumed run drops."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deepvision.runtime.meters import Metrics
from deepvision.runtime.run_logger import NullLogger, RunLogger

TAG = "data/top1_accuracy"


def scalars(folder, tag):
    events = EventAccumulator(str(folder)).Reload()
    return [(p.step, p.value) for p in events.Scalars(tag)]


def log(logger, epochs, accuracy):
    for epoch in epochs:
        for step in (10 * epoch - 5, 10 * epoch):
            logger.log_step(step, 1.0, 0.1)
        val = Metrics(1.0, accuracy[epoch], 90.0)
        logger.log_epoch(epoch, Metrics(1.0, 5.0, 50.0), val, {"robust_top1_accuracy": 1.0})


def test_a_run_takes_three_of_tensorboards_runs(tmp_path):
    with RunLogger(tmp_path) as logger:
        log(logger, (1, 2, 3), {1: 10.0, 2: 30.0, 3: 20.0})
    folders = {f.parent.name for f in tmp_path.rglob("events.out.tfevents.*")}
    assert folders == {tmp_path.name, "train", "val"}
    assert scalars(tmp_path, TAG) == [(1, 10.0), (2, 30.0), (3, 30.0)]  # the best so far
    assert scalars(tmp_path / "val", TAG) == [(1, 10.0), (2, 30.0), (3, 20.0)]
    assert scalars(tmp_path / "train", "data/top5_accuracy") == [(e, 50.0) for e in (1, 2, 3)]


def test_a_resumed_run_repeats_an_epoch_without_a_second_point(tmp_path):
    accuracy = {1: 10.0, 2: 30.0, 3: 40.0}
    with RunLogger(tmp_path) as logger:
        log(logger, (1, 2), accuracy)
        logger.log_step(25, 1.0, 0.1)
    with RunLogger(tmp_path, step=11, epochs_done=1) as logger:  # killed before epoch 2 was saved
        log(logger, (2, 3), accuracy)
    for folder in (tmp_path, tmp_path / "val"):
        assert scalars(folder, TAG) == [(1, 10.0), (2, 30.0), (3, 40.0)]
    assert [s for s, _ in scalars(tmp_path, "data/training_loss")] == [5, 10, 15, 20, 25, 30]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_other_ranks_record_nothing(tmp_path):
    with NullLogger(tmp_path) as logger:
        log(logger, (1,), {1: 10.0})
        logger.sync()
    assert list(tmp_path.iterdir()) == []
