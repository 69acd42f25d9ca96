"""A progress bar for those who watch: none in a file, and none where tqdm is missing."""

from __future__ import annotations

import sys

try:
    from tqdm import tqdm
except ImportError:  # a bare machine trains all the same
    tqdm = None


class NoBar:
    """What tqdm's bar offers, without a bar."""

    def update(self, n: int = 1) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def progress_bar(total: int, name: str | None = None, start: int = 0, hidden: bool = False):
    """tqdm's bar; gone once it is closed."""
    if tqdm is None:
        return NoBar()
    disable = hidden or None  # None: unless a terminal shows it
    return tqdm(total=total, desc=name, initial=start, leave=False, disable=disable)


def print_above(line: str) -> None:
    """Print to standard output, above the bar."""
    if tqdm is None:
        print(line)
    else:
        tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
