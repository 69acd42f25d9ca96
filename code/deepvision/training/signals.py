"""When a run saves in mid-epoch, and how it is asked to stop."""

from __future__ import annotations

import re
import signal
import time

from deepvision.runtime import distributed


class SavePoint:
    """Says when to save in mid-epoch, and turns Ctrl-C and SIGTERM into a request to stop.

    every: '10m', '30s' (minutes, seconds) or '200' (steps).
    Inside the `with` block the first signal only counts as a request, so that the step under way
    can end and be saved; a second one acts at once. What one process is asked, all are.
    """

    def __init__(self, every: str) -> None:
        self.every, self.seconds = parse_interval(every)
        self.request = 0  # the number of the signal
        self.stopped_by: signal.Signals | None = None
        self.steps, self.since = 0, time.monotonic()

    def __enter__(self) -> SavePoint:
        self.previous = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: object) -> None:
        self.request = number
        signal.signal(number, self.previous[number])

    def stopped(self) -> bool:
        """Whether the run was asked to stop; `stopped_by` then tells by which signal."""
        return self._agree(late=False)

    def due(self) -> bool:
        """Count one step; true when a checkpoint is due or a stop was asked for."""
        self.steps += 1
        passed = time.monotonic() - self.since if self.seconds else self.steps
        return self._agree(late=passed >= self.every)

    def _agree(self, late: bool) -> bool:
        """Whether any process was asked to stop, or is late; asked of all at once."""
        number, late = divmod(distributed.all_reduce_max(2 * self.request + late), 2)
        if number:
            self.stopped_by = signal.Signals(number)
        return self.stopped_by is not None or bool(late)

    def saved(self) -> None:
        self.steps, self.since = 0, time.monotonic()


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
