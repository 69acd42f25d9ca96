"""The records of a run: TensorBoard events, config.json, metrics.jsonl.

A run takes three of TensorBoard's runs, which unticks all runs beyond forty: the folder itself
(loss, learning rate, best accuracy, images), train/ and val/, whose accuracies share charts with
the best.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.summary_v2 import Metric
from torch import Tensor

from deepvision.runtime import distributed
from deepvision.runtime.atomic import write_atomically
from deepvision.runtime.event_file import EventFile
from deepvision.runtime.jsonl import read_metrics
from deepvision.runtime.meters import Metrics
from deepvision.runtime.run_dir import lock_run

logging.getLogger("tensorboard").setLevel(logging.CRITICAL)  # it reports each purged point

ACCURACIES = {"top1_accuracy": "acc1", "top5_accuracy": "acc5"}
BEST = "data/top1_accuracy"  # in the folder itself: the best validation accuracy so far
BY_ITERATION = ("data/training_loss", "data/learning_rate")
# With the network, the columns of TensorBoard's HParams: with one more, the accuracy would not be
# visible on a screen of 1280 pixels
HYPERPARAMETERS = ("epochs", "batch_size", "lr")

# Columns of metrics.jsonl that depend on the machine: equal runs differ in them
MACHINE_COLUMNS = ("images_per_second", "seconds", "peak_memory_bytes")


class RunLogger:
    """Writes the records of one run; open it with `with`.

    step, epochs_done: where a resumed run continues. Points and rows after them are dropped, since
        the run writes them again.

    Raises:
        UserError: on entry or at any record, if the disk is full or the folder not writable; on
            entry, if another process writes to the run.
    """

    def __init__(self, run_dir: Path, step: int = 0, epochs_done: int = 0) -> None:
        self.run_dir, self.purge_step, self.epochs_done = run_dir, step or None, epochs_done
        self.metrics_file = run_dir / "metrics.jsonl"
        self.rows: list[dict] = []
        self.parts: dict[str, EventFile] = {}
        self.points: dict[str, dict[int, float]] = {}  # of single curves, by tag and step
        self.lock = self.events = None

    def __enter__(self) -> RunLogger:
        self.lock = lock_run(self.run_dir)
        self.points = read_points(self.run_dir)
        self.events = EventFile(self.run_dir, self.purge_step)
        if self.purge_step:
            rows = read_metrics(self.metrics_file)
            self.rows = [row for row in rows if row["epoch"] <= self.epochs_done]
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.events, *self.parts.values()):
            file.close()
        if self.lock:
            self.lock.close()

    def log_config(self, record: dict, hparams: dict) -> None:
        """Write config.json, and `hparams` to TensorBoard's HParams with the best accuracy."""
        write_atomically(self.run_dir / "config.json", json.dumps(record, indent=2).encode())
        best = Metric(BEST, display_name="best top-1")
        self.events.hparams(hparams, best, self.run_dir.name)

    def log_step(self, iteration: int, loss: float, lr: float) -> None:
        """Record a batch's loss and learning rate."""
        for tag, value in zip(BY_ITERATION, (loss, lr), strict=True):
            self.events.scalar(tag, value, iteration)

    def log_epoch(self, epoch: int, train: Metrics, val: Metrics, columns: dict) -> None:
        """Record a finished epoch, counted from 1; `columns` go to its row in metrics.jsonl."""
        for tag, attribute in ACCURACIES.items():
            for part, metrics in (("train", train), ("val", val)):
                self.add_curve_point(f"data/{tag}", part, getattr(metrics, attribute), epoch)
        self.rows.append(
            {
                "epoch": epoch,
                "train_loss": train.loss,
                **{f"train_{k}": getattr(train, v) for k, v in ACCURACIES.items()},
                **{f"val_{k}": getattr(val, v) for k, v in ACCURACIES.items()},
                **columns,
            }
        )
        if "robust_top1_accuracy" in columns:
            self.add_scalar("data/robust_top1_accuracy", columns["robust_top1_accuracy"], epoch)
        best = max(row["val_top1_accuracy"] for row in self.rows)
        self.add_scalar(BEST, best, epoch)
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self.metrics_file, text.encode())

    def add_image(self, tag: str, image: Tensor, step: int) -> None:
        """Add an image (3, H, W) in [0, 1] to TensorBoard's Images."""
        self.events.image(tag, image, step)

    def add_scalar(self, tag: str, value: float, x: int) -> None:
        """Add a point of a single curve, unless it is there: a killed run logs an epoch twice."""
        if self.points.get(tag, {}).get(x) != np.float32(value):
            self.events.scalar(tag, value, x)

    def add_curve_point(self, tag: str, part: str, value: float, x: int) -> None:
        """Add a point of one of the curves of a chart; `part` is its folder and its name."""
        if part not in self.parts:  # the new file drops an older file's points from x on
            self.parts[part] = EventFile(self.run_dir / part, x)
        self.parts[part].scalar(tag, value, x)

    def add_text(self, tag: str, markdown: str) -> None:
        """Add Markdown to TensorBoard's Text."""
        self.events.text(tag, markdown)

    def sync(self) -> None:
        """Sync all points to disk; a checkpoint written afterwards relies on them."""
        for file in (self.events, *self.parts.values()):
            file.sync()


def read_points(run_dir: Path) -> dict[str, dict[int, float]]:
    """The curves by epoch or epsilon in the folder's own event files: {tag: {step: value}}."""
    if not any(run_dir.glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str(run_dir), {"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in BY_ITERATION]
    return {tag: {point.step: point.value for point in events.Scalars(tag)} for tag in tags}


class NullLogger:
    """A RunLogger that records nothing: that of every rank but 0."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **options: None

    def __enter__(self) -> NullLogger:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def make_logger(run_dir: Path, step: int = 0, epochs_done: int = 0) -> RunLogger | NullLogger:
    """The logger of this process."""
    if distributed.is_main_process():
        return RunLogger(run_dir, step, epochs_done)
    return NullLogger(run_dir)
