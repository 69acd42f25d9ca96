"""What a run tells: console lines, progress bar, TensorBoard, metrics.jsonl, config.json."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoint import write_atomically
from engine import Clock, Scores
from utils import UserError

LOGS = Path(__file__).resolve().parent.parent / "logs"
ACCURACIES = {"top1_accuracy": "acc1", "top5_accuracy": "acc5"}


def new_run(kind: str) -> Path:
    """Make the folder logs/<kind>_exp_<date and time>.

    Raises:
        UserError: the logs folder cannot be written.
    """
    while True:
        folder = LOGS / f"{kind}_exp_{datetime.now():%Y-%m-%d_%H-%M-%S}"
        try:
            (folder / "models").mkdir(parents=True)
            return folder
        except FileExistsError:  # another run started within this second
            time.sleep(1)
        except OSError as e:
            raise UserError(f"cannot make the run folder {folder}: {e.strerror}") from None


def run_of(checkpoint: str | Path) -> Path | None:
    """The run folder that a checkpoint lies in, None for one outside any."""
    models = Path(checkpoint).resolve().parent
    return models.parent if models.name == "models" else None


class Logbook:
    """One run's records in its folder.

    A resumed run passes its next iteration and the epochs it has done: points and rows that were
    written after the checkpoint are dropped, since the run writes them again.
    """

    def __init__(self, folder: Path, step: int = 0, epochs_done: int = 0) -> None:
        self.folder = folder
        self.writer = SummaryWriter(folder, purge_step=step or None)
        self.groups = {}
        self.group_purge = epochs_done + 1 if step else None
        self.rows = []
        self.metrics = folder / "metrics.jsonl"
        if step and self.metrics.exists():
            rows = map(json.loads, self.metrics.read_text().splitlines())
            self.rows = [row for row in rows if row["epoch"] <= epochs_done]

    def config(self, content: dict) -> None:
        """Write down how the run was started."""
        content = {**content, "torch": torch.__version__, "commit": commit()}
        write_atomically(self.folder / "config.json", json.dumps(content, indent=2).encode())

    def step(self, iteration: int, loss: float, learning_rate: float) -> None:
        self.writer.add_scalar("data/training_loss", loss, iteration)
        self.writer.add_scalar("data/learning_rate", learning_rate, iteration)

    def epoch(self, epoch: int, train: Scores, val: Scores, **more: float) -> None:
        """Record one finished epoch, counted from 1."""
        for tag, attribute in ACCURACIES.items():
            for name, scores in (("train", train), ("val", val)):
                self._group(tag, name).add_scalar(f"data/{tag}", getattr(scores, attribute), epoch)
        self.rows.append(
            {
                "epoch": epoch,
                "train_loss": train.loss,
                **{f"train_{k}": getattr(train, v) for k, v in ACCURACIES.items()},
                **{f"val_{k}": getattr(val, v) for k, v in ACCURACIES.items()},
                **more,
            }
        )
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self.metrics, text.encode())
        self.flush()

    def _group(self, tag: str, name: str) -> SummaryWriter:
        """The writer of one curve of a scalar group, in the folder that add_scalars would use."""
        if (tag, name) not in self.groups:
            folder = self.folder / f"data_{tag}_{name}"
            self.groups[tag, name] = SummaryWriter(folder, purge_step=self.group_purge)
        return self.groups[tag, name]

    def picture(self, tag: str, image: Tensor, step: int) -> None:
        """Show an image (3, H, W) in [0, 1] under TensorBoard's Images."""
        self.writer.add_image(tag, image, step)

    def flush(self) -> None:
        for writer in (self.writer, *self.groups.values()):
            writer.flush()

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in (self.writer, *self.groups.values()):
            writer.close()


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
        self.bar = tqdm(total=total, initial=start, leave=False, disable=not sys.stderr.isatty())

    def step(self, i: int) -> bool:
        """Move the bar to batch i; true when this batch's line is to be printed."""
        self.bar.update()
        return i % self.print_freq == 0

    def train_line(
        self, epoch: int, i: int, clock: Clock, last: Scores, mean: Scores, batch_size: int
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

    def test_line(self, i: int, clock: Clock, last: Scores, mean: Scores) -> None:
        self._print(
            f"Test: [{i}/{self.total}]", _timing("Time", clock.step), *_accuracies(last, mean)
        )

    def _print(self, *columns: str) -> None:
        tqdm.write("\t".join(columns), file=sys.stdout)
        sys.stdout.flush()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _timing(name: str, meter: object) -> str:
    return f"{name} {meter.val:.3f} ({meter.avg:.3f})"


def _accuracies(last: Scores, mean: Scores) -> tuple[str, str]:
    return f"Acc@1 {last.acc1:.2f} ({mean.acc1:.2f})", f"Acc@5 {last.acc5:.2f} ({mean.acc5:.2f})"


def final_line(scores: Scores) -> str:
    return f"******Acc@1 {scores.acc1:.3f} Acc@5 {scores.acc5:.3f}"
