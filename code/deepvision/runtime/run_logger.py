"""What a run tells: console lines, progress bar, TensorBoard, its .json and .jsonl files."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import torch
from tensorboard.plugins.hparams.summary_v2 import Metric
from torch import Tensor

from deepvision.checkpoint import write_atomically
from deepvision.runtime import distributed
from deepvision.runtime.console import print_above, progress_bar
from deepvision.runtime.event_file import EventFile
from deepvision.training.engine import Metrics, StepTimer
from utils import UserError, relpath

try:
    import fcntl
except ImportError:  # Windows: two processes may write to one run
    fcntl = None

LOGS = Path(__file__).resolve().parents[3] / "logs"
ACCURACIES = {"top1_accuracy": "acc1", "top5_accuracy": "acc5"}
BEST = "data/top1_accuracy", "best"  # the curve of the best validation accuracy so far
# With network and at they are TensorBoard's columns; it shows the first five by the alphabet
HYPERPARAMETERS = ("epochs", "batch_size", "lr", "warmup", "wd")

# What a row of metrics.jsonl tells of the machine: two runs alike in all else differ in it
OF_THE_MACHINE = ("images_per_second", "seconds", "peak_memory_bytes")


def new_run(kind: str) -> Path:
    """Make the folder logs/<kind>_exp_<date and time>.

    Raises:
        UserError: the logs folder cannot be written.
    """
    if not distributed.is_main_process():
        return LOGS  # where it will write nothing
    while True:
        folder = LOGS / f"{kind}_exp_{datetime.now():%Y-%m-%d_%H-%M-%S}"
        try:
            (folder / "models").mkdir(parents=True)
            return folder
        except FileExistsError:  # another run started within this second
            time.sleep(1)
        except OSError as e:
            raise UserError(f"cannot make the run folder {folder}: {e.strerror}") from None


def latest_run(kinds: Iterable[str]) -> Path | None:
    """The run folder of one of these kinds that was begun last."""
    begun = {f: f.name.partition("_exp_") for f in LOGS.glob("*_exp_*")}
    folders = [f for f, (kind, _, _) in begun.items() if kind in kinds]
    return max(folders, key=lambda f: begun[f][2], default=None)


def run_dir_of(checkpoint: str | Path) -> Path | None:
    """The run folder that a checkpoint lies in, None for one outside any."""
    models = Path(checkpoint).resolve().parent
    return models.parent if models.name == "models" else None


def run_launched_as(launch: str) -> Path | None:
    """The run that these processes had begun before torchrun restarted them."""
    begun = []
    for config in LOGS.glob("*_exp_*/config.json"):
        with contextlib.suppress(OSError, ValueError):
            if json.loads(config.read_bytes()).get("launch") == launch:
                begun.append(config.parent)
    return max(begun, key=lambda folder: folder.name.partition("_exp_")[2], default=None)


def add_evaluation(folder: Path, **row: object) -> None:
    """Add what -e or -a found to evaluations.jsonl, unless the folder is somebody else's."""
    if not distributed.is_main_process():
        return
    row = {"date": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "commit": commit(), **row}
    with contextlib.suppress(OSError), open(folder / "evaluations.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


class RunLogger:
    """One run's records in its folder.

    A resumed run passes its next iteration and the epochs it has done: points and rows that were
    written after the checkpoint are dropped, since the run writes them again.

    Raises:
        UserError: here or at any record, if the disk is full or the folder not writable; here, if
            another process writes there.
    """

    def __init__(self, folder: Path, step: int = 0, epochs_done: int = 0) -> None:
        self.folder = folder
        self.claim = lock_run(folder)
        self.events = EventFile(folder, step or None)
        self.curves: dict[tuple[str, str], EventFile] = {}
        self.metrics = folder / "metrics.jsonl"
        self.rows = read_rows(self.metrics, epochs_done) if step else []

    def config(self, content: dict) -> None:
        """Write down how the run was started."""
        content = {**content, "torch": torch.__version__, "commit": commit()}
        write_atomically(self.folder / "config.json", json.dumps(content, indent=2).encode())
        values = {name: content["arguments"][name] for name in HYPERPARAMETERS}
        tag, name = BEST
        best = Metric(tag, _folder(tag, name), display_name="best top-1 accuracy")
        self.events.hparams(
            {"network": content["kind"], "at": content["arguments"]["at"] or "off", **values},
            best,
            self.folder.name,
        )

    def log_step(self, iteration: int, loss: float, learning_rate: float) -> None:
        self.events.scalar("data/training_loss", loss, iteration)
        self.events.scalar("data/learning_rate", learning_rate, iteration)

    def log_epoch(self, epoch: int, train: Metrics, val: Metrics, **more: float | None) -> None:
        """Record one finished epoch, counted from 1; `more` goes to its row in metrics.jsonl."""
        for tag, attribute in ACCURACIES.items():
            for name, scores in (("train", train), ("val", val)):
                self.add_curve_point(f"data/{tag}", name, getattr(scores, attribute), epoch)
        self.rows.append(
            {
                "epoch": epoch,
                "train_loss": train.loss,
                **{f"train_{k}": getattr(train, v) for k, v in ACCURACIES.items()},
                **{f"val_{k}": getattr(val, v) for k, v in ACCURACIES.items()},
                **more,
            }
        )
        if "robust_top1_accuracy" in more:
            self.add_curve_point(
                "data/top1_accuracy", "robust", more["robust_top1_accuracy"], epoch
            )
        best = max(row["val_top1_accuracy"] for row in self.rows)
        self.add_curve_point(*BEST, best, epoch)
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self.metrics, text.encode())

    def add_image(self, tag: str, image: Tensor, step: int) -> None:
        """Show an image (3, H, W) in [0, 1] under TensorBoard's Images."""
        self.events.image(tag, image, step)

    def add_curve_point(self, tag: str, curve: str, value: float, x: int) -> None:
        """A point of one of the curves that one chart shows: a scalar group, as add_scalars'."""
        if (tag, curve) not in self.curves:
            folder = self.folder / _folder(tag, curve)
            self.curves[tag, curve] = EventFile(folder, x)  # an older file's points end here
        self.curves[tag, curve].scalar(tag, value, x)

    def text(self, tag: str, markdown: str) -> None:
        self.events.text(tag, markdown)

    def sync(self) -> None:
        """Have the disk hold all points, as a checkpoint that comes after them relies on it."""
        for file in (self.events, *self.curves.values()):
            file.sync()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.events, *self.curves.values()):
            file.close()
        if self.claim:
            self.claim.close()


def lock_run(folder: Path) -> BinaryIO | None:
    """An open file; no other process can claim the run folder until it is closed.

    The system closes a dead process's. None where there are no locks, or nothing can be written.

    Raises:
        UserError: another process has claimed it.
    """
    with contextlib.suppress(OSError):
        file = open(folder / ".lock", "wb")  # noqa: SIM115
        try:
            if fcntl:  # not flock: processes that load images may outlive a run, and would hold it
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            raise UserError(
                f"another process writes to {relpath(folder)}: let it end, or stop it"
            ) from None
    return None


def _folder(tag: str, curve: str) -> str:
    return f"{tag}/{curve}".replace("/", "_")


class NullLogger:
    """What a process has that is not the one to write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **options: None

    def __enter__(self) -> NullLogger:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def open_logger(folder: Path, step: int = 0, epochs_done: int = 0) -> RunLogger | NullLogger:
    return (
        RunLogger(folder, step, epochs_done)
        if distributed.is_main_process()
        else NullLogger(folder)
    )


def read_rows(metrics: Path, epochs: int) -> list[dict]:
    """The rows of the first `epochs` epochs.

    Raises:
        UserError: the file cannot be read, or a line of it is no row.
    """
    try:
        lines = metrics.read_bytes().splitlines() if metrics.exists() else []
        return [row for row in map(json.loads, lines) if row["epoch"] <= epochs]
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"cannot read {metrics}: {e}; move it away to go on") from None


def commit() -> str | None:
    """The commit of this checkout, with a + if it was changed since; None outside git."""
    git = ["git", "-C", str(LOGS.parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Console:
    """The lines of one pass over the data, above a progress bar where there is a terminal."""

    def __init__(self, total: int, print_freq: int, start: int = 0) -> None:
        self.total, self.print_freq = total, print_freq
        self.bar = progress_bar(total, start=start, hidden=not distributed.is_main_process())

    def step(self, i: int) -> bool:
        """Move the bar to batch i; true when this batch's line is to be printed."""
        self.bar.update()
        return i % self.print_freq == 0

    def train_line(
        self, epoch: int, i: int, clock: StepTimer, last: Metrics, mean: Metrics, batch_size: int
    ) -> None:
        seconds = max(clock.step.avg, 1e-9)
        left = timedelta(seconds=math.ceil(seconds * (self.total - i - 1)))
        self._print(
            f"Epoch: [{epoch}][{i}/{self.total}]",
            _timing("Time", clock.step),
            _timing("Data", clock.data),
            f"Loss {last.loss:.2f} ({mean.loss:.2f})",
            *_accuracies(last, mean),
            f"Img/s {batch_size / seconds:.0f}",
            f"Left {left}",
        )

    def test_line(self, i: int, clock: StepTimer, last: Metrics, mean: Metrics) -> None:
        self._print(
            f"Test: [{i}/{self.total}]", _timing("Time", clock.step), *_accuracies(last, mean)
        )

    def _print(self, *columns: str) -> None:
        print_above("\t".join(columns))

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _timing(name: str, meter: object) -> str:
    return f"{name} {meter.val:.3f} ({meter.avg:.3f})"


def _accuracies(last: Metrics, mean: Metrics) -> tuple[str, str]:
    return f"Acc@1 {last.acc1:.2f} ({mean.acc1:.2f})", f"Acc@5 {last.acc5:.2f} ({mean.acc5:.2f})"


def final_line(scores: Metrics) -> str:
    return f"******Acc@1 {scores.acc1:.3f} Acc@5 {scores.acc5:.3f}"
