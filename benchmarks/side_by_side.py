"""Compare variants of the same work: they alternate, and each is compared with the first."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection

import torch
from results_file import RESULTS, origin, origin_line

from deepvision.config import OneLineParser

TIMES = "One thread: CPU time; two: wall time. Medians of interleaved rounds, ratios within each."
Work = Callable[[], None]
Variants = dict[str, Callable[[], Work]]  # name -> function that prepares the work


def make_parser(description: str, batch_size: int) -> OneLineParser:
    """A parser with --batch-size and --rounds."""
    parser = OneLineParser(description=description)
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images per step")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all variants")
    return parser


def measure(
    subjects: Iterable[str], variants: Callable[[str], Variants], rounds: int, images: int
) -> list[dict]:
    """The rows of all subjects, on one and two threads; `images`: how many each variant takes."""
    torch.set_num_threads(1)
    return [
        row
        for threads in (1, 2)
        for subject in subjects
        for row in summary(subject, threads, seconds(variants(subject), rounds, threads), images)
    ]


def seconds(variants: Variants, rounds: int, threads: int = 1) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one warm-up round.

    Each variant runs in a separate process, since the memory allocated by one would change the
    next. On one thread it is the CPU time of that process, which does not depend on other work on
    the machine; on more it is wall time.
    """
    connections = {name: _start(prepare, threads) for name, prepare in variants.items()}
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, connection in connections.items():
            connection.send(True)
            found[name].append(connection.recv())
    for connection in connections.values():
        connection.send(False)
    return {name: values[1:] for name, values in found.items()}


def beside(prepare: Callable[[], Work], rounds: int, threads: int = 2) -> float:
    """The speed of two processes that do the same work at once, each as a fraction of one alone."""
    connections = [_start(prepare, threads) for _ in range(2)]

    def run(some: list[Connection]) -> float:
        for connection in some:
            connection.send(True)
        return statistics.mean(connection.recv() for connection in some)

    run(connections)  # warm-up
    ratios = [run(connections[:1]) / run(connections) for _ in range(rounds)]
    for connection in connections:
        connection.send(False)
    return statistics.median(ratios)


def _start(prepare: Callable[[], Work], threads: int) -> Connection:
    parent, child = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")
    fork.Process(target=_serve, args=(prepare, child, threads), daemon=True).start()
    return parent


def _serve(prepare: Callable[[], Work], connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    now = time.process_time if threads == 1 else time.perf_counter
    work = prepare()
    while connection.recv():
        start = now()
        work()
        connection.send(now() - start)


def summary(subject: str, threads: int, seconds: dict[str, list[float]], images: int) -> list[dict]:
    """One row per variant: median milliseconds per image, median speedup over the first."""
    base = next(iter(seconds.values()))
    return [
        {
            "subject": subject,
            "variant": name,
            "threads": threads,
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
    lines += ["| | variant | threads | ms / image | speedup |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {r['subject']} | {r['variant']} | {r['threads']} | {r['ms_per_image']:.2f} | "
        f"{r['speedup']:.2f} |"
        for r in rows
    ]
    text = "\n".join(lines) + "\n"
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
