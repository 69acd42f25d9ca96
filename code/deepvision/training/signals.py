"""Requests to stop (Ctrl-C, SIGTERM), and when to save within an epoch."""

from __future__ import annotations

import re
import signal
import time

from deepvision.runtime import distributed


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a request to stop after the current step.

    Inside the `with` block the first signal is only recorded; a second one acts at once. A request
    to one process stops all processes of the run.

    stopped_by: the signal, once all processes know of it.
    """

    def __init__(self) -> None:
        self.requested = 0  # signal number seen by this process
        self.stopped_by: signal.Signals | None = None
        self.previous: dict = {}

    def __enter__(self) -> StopSignal:
        self.previous = {
            s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: object) -> None:
        self.requested = number
        signal.signal(number, self.previous[number])

    def check(self, save_due: bool = False) -> bool:
        """Return True if any process was asked to stop, or has `save_due`; all call it at once."""
        number, save_due = divmod(distributed.all_reduce_max(2 * self.requested + save_due), 2)
        if number:
            self.stopped_by = signal.Signals(number)
        return self.stopped_by is not None or bool(save_due)


class CheckpointTimer:
    """When the next checkpoint is due, in seconds or in steps.

    every: an interval such as 10m, 30s or 200 (steps).
    """

    def __init__(self, every: str) -> None:
        self.every, self.in_seconds = parse_interval(every)
        self.steps, self.last_save = 0, time.monotonic()

    def step(self) -> bool:
        """Count a step; return True if a checkpoint is due."""
        self.steps += 1
        elapsed = time.monotonic() - self.last_save if self.in_seconds else self.steps
        return elapsed >= self.every

    def reset(self) -> None:
        """Start the next interval."""
        self.steps, self.last_save = 0, time.monotonic()


def parse_interval(text: str) -> tuple[int, bool]:
    """'10m' -> (600, True) in seconds; '200' -> (200, False) in steps.

    Raises:
        ValueError: anything else, or zero.
    """
    match = re.fullmatch(r"(\d+)([ms]?)", text)
    if not match or int(match[1]) == 0:
        raise ValueError(f"'{text}' is not an interval like 10m, 30s or 200 (steps)")
    number, unit = int(match[1]), match[2]
    return number * (60 if unit == "m" else 1), unit != ""
