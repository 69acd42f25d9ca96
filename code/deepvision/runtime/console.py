"""Console output: progress bars, and one line every print-freq batches."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TextIO

from tqdm import tqdm

from deepvision.runtime import distributed
from deepvision.runtime.meters import EpochMetrics, Metrics, StepTimer
from utils import AverageMeter


class SafeStream:
    """A text stream whose output is dropped once its terminal is gone (EIO)."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def _call(self, name: str, *args: str) -> object:
        try:
            return getattr(self.stream, name)(*args)
        except OSError as e:
            if e.errno != errno.EIO:
                raise
            self.stream = open(os.devnull, "w")  # noqa: SIM115 - open for the rest of the run
            return None

    def write(self, text: str) -> int:
        """Write `text`, or drop it."""
        self._call("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush what is written."""
        self._call("flush")

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def protect_streams() -> None:
    """Let output survive an encoding that lacks characters, and a terminal that goes away."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, SafeStream(stream))


@contextlib.contextmanager
def script(interrupt: signal.Handlers | Callable) -> Iterator[None]:
    """Run a script's work with protected streams, and end it without a traceback by Ctrl-C.

    interrupt: the handler of SIGINT, which the script has replaced while it imported modules.
    """
    protect_streams()
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nor a traceback from Python's own end


def progress_bar(total: int, name: str | None = None, start: int = 0) -> tqdm:
    """tqdm's bar, removed when closed; shown on a terminal only, by rank 0 only."""
    disable = None if distributed.is_main_process() else True  # None: unless it is a terminal
    return tqdm(total=total, desc=name, initial=start, leave=False, disable=disable)


def print_above(line: str) -> None:
    """Print to standard output, above the bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class Console:
    """The lines of one pass over the data, above a progress bar.

    start: the batch that the pass starts from.
    """

    def __init__(self, total: int, print_freq: int, start: int = 0) -> None:
        self.total, self.print_freq = total, print_freq
        self.bar = progress_bar(total, start=start)

    def advance(self, i: int) -> bool:
        """Move the bar past batch i; return True if the batch's line is due."""
        self.bar.update()
        return i % self.print_freq == 0

    def train_line(
        self, epoch: int, i: int, timer: StepTimer, last: Metrics, mean: Metrics, batch_size: int
    ) -> None:
        """Print batch i of a training epoch; epochs count from 1."""
        seconds = max(timer.step.avg, 1e-9)
        print_above(
            "\t".join(
                [
                    f"Epoch: [{epoch}][{i}/{self.total}]",
                    _timing("Time", timer.step),
                    _timing("Data", timer.data),
                    f"Loss {last.loss:.2f} ({mean.loss:.2f})",
                    *_accuracies(last, mean),
                    f"Img/s {batch_size / seconds:.0f}",
                    f"Left {timedelta(seconds=math.ceil(seconds * (self.total - i - 1)))}",
                ]
            )
        )

    def test_line(self, i: int, timer: StepTimer, metrics: EpochMetrics) -> None:
        """Print batch i of an evaluation."""
        columns = [_timing("Time", timer.step), *_accuracies(*metrics.compute())]
        print_above("\t".join([f"Test: [{i}/{self.total}]", *columns]))

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _timing(name: str, meter: AverageMeter) -> str:
    return f"{name} {meter.val:.3f} ({meter.avg:.3f})"


def _accuracies(last: Metrics, mean: Metrics) -> tuple[str, str]:
    return f"Acc@1 {last.acc1:.2f} ({mean.acc1:.2f})", f"Acc@5 {last.acc5:.2f} ({mean.acc5:.2f})"


def final_line(metrics: Metrics) -> str:
    """The line that scripts grep for."""
    return f"******Acc@1 {metrics.acc1:.3f} Acc@5 {metrics.acc5:.3f}"
