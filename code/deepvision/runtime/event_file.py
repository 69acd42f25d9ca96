"""TensorBoard event files, written in the caller's thread.

torch's SummaryWriter writes from a background thread that may hold records back for minutes and,
on a full disk, prints a traceback. Here each record is in the file when the call returns: a killed
run loses none, and the caller handles errors.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from utils import UserError

_numbers = itertools.count()


class EventFile:
    """A new event file in `folder`.

    TensorBoard drops every point of the folder's older files from `purge_step` on.

    Raises:
        UserError: here or at any record, if the disk is full or the folder not writable.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        # TensorBoard reads a folder's files in the order of their names, and the clock of the
        # machine that resumes a run may be behind
        last = max(map(_start_time, folder.glob("events.out.tfevents.*")), default=0)
        begun = f"{max(time.time(), last + 1):010.0f}"
        name = f"{begun}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self.path = folder / f"events.out.tfevents.{name}"
        with self._errors_as_one_line():
            folder.mkdir(exist_ok=True)
            self.file = open(self.path, "wb")  # noqa: SIM115 - stays open as long as the run
        self.records = RecordWriter(self.file)
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point of a curve."""
        self._add(step=step, summary=summary.scalar(tag, value))

    def image(self, tag: str, image: Tensor, step: int) -> None:
        """Add an image (3, H, W) in [0, 1]."""
        self._add(step=step, summary=summary.image(tag, image, dataformats="CHW"))

    def text(self, tag: str, markdown: str) -> None:
        """Add Markdown."""
        self._add(step=0, summary=summary.text(tag, markdown))

    def hparams(self, values: dict, metric: hparams.Metric, run: str) -> None:
        """Add a run's settings to TensorBoard's HParams, with a scalar that the run logs."""
        columns = [hparams.HParam(name) for name in values]
        self._add(step=0, summary=hparams.hparams_config_pb(columns, [metric]))
        self._add(step=0, summary=hparams.hparams_pb(values, trial_id=run))

    def sync(self) -> None:
        """Sync to disk, so that a power failure loses nothing."""
        with self._errors_as_one_line():
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # each written record is in the file already
            self.file.close()

    def _add(self, **content: object) -> None:
        with self._errors_as_one_line():
            self.records.write(Event(wall_time=time.time(), **content).SerializeToString())
            self.file.flush()

    @contextlib.contextmanager
    def _errors_as_one_line(self):
        try:
            yield
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror or e}") from None


def _start_time(file: Path) -> int:
    seconds = file.name.split(".")[3]
    return int(seconds) if seconds.isdecimal() else 0
