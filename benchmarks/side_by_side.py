"""Compare variants of the same work: they alternate, and each is compared with the first."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection

import torch
from results_file import RESULTS, origin, origin_line

Work = Callable[[], None]
Variants = dict[str, Callable[[], Work]]  # name -> function that prepares the work


def make_parser(description: str, batch_size: int) -> argparse.ArgumentParser:
    """A parser with --batch-size and --rounds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--rounds", type=int, default=7)
    return parser


def measure(
    subjects: Iterable[str], variants: Callable[[str], Variants], rounds: int, images: int
) -> list[dict]:
    """The rows of all subjects, on one thread; `images`: how many each variant processes."""
    torch.set_num_threads(1)
    return [
        row
        for subject in subjects
        for row in summary(subject, cpu_seconds(variants(subject), rounds), images)
    ]


def cpu_seconds(variants: Variants, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each variant in each round, after one warm-up round.

    Each variant runs in a separate process, since the memory allocated by one would change the
    next. The CPU time of that process does not depend on other work on the machine.
    """
    connections = {name: _start(prepare) for name, prepare in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, connection in connections.items():
            connection.send(True)
            seconds[name].append(connection.recv())
    return {name: values[1:] for name, values in seconds.items()}


def _start(prepare: Callable[[], Work]) -> Connection:
    parent, child = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")
    fork.Process(target=_serve, args=(prepare, child), daemon=True).start()
    return parent


def _serve(prepare: Callable[[], Work], connection: Connection) -> None:
    work = prepare()
    while connection.recv():
        start = time.process_time()
        work()
        connection.send(time.process_time() - start)


def summary(subject: str, seconds: dict[str, list[float]], images: int) -> list[dict]:
    """One row per variant: median milliseconds per image, median speedup over the first."""
    base = next(iter(seconds.values()))
    return [
        {
            "subject": subject,
            "variant": name,
            "ms_per_image": round(1e3 * statistics.median(values) / images, 3),
            "speedup": round(
                statistics.median(b / v for v, b in zip(values, base, strict=True)), 2
            ),
            "rounds_s": [round(v, 4) for v in values],
        }
        for name, values in seconds.items()
    ]


def write(name: str, title: str, note: str, rows: list[dict], command: str, **more: object) -> None:
    """Write results/`name`.json and .md; print the table."""
    target, source = RESULTS / name, origin(command)
    record = {**source, **more, "rows": rows}
    target.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    lines = [f"# {title}", "", f"{origin_line(source)} {note}", ""]
    lines += ["| | variant | CPU ms / image | speedup |", "|---|---|---:|---:|"]
    lines += [
        f"| {r['subject']} | {r['variant']} | {r['ms_per_image']:.2f} | {r['speedup']:.2f} |"
        for r in rows
    ]
    text = "\n".join(lines) + "\n"
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
