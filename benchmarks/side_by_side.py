"""Ways to do the same work, taking turns, each held to the first one in the same round."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from results_file import ROOT, provenance

Work = Callable[[], None]
Ways = dict[str, Callable[[], Work]]  # what prepares the work of each way, in its own process


def options(description: str, batch_size: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--rounds", type=int, default=7)
    return parser


def measure(subjects: Iterable[str], ways: Callable[[str], Ways], rounds: int, images: int) -> list:
    """The rows of all subjects, on one thread; `images` is how many each way handles."""
    torch.set_num_threads(1)
    return [
        row
        for subject in subjects
        for row in summary(subject, cpu_seconds(ways(subject), rounds), images)
    ]


def cpu_seconds(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """What each way takes in each round, after one round that is not counted.

    Each has a process of its own, since how one treats memory would change the next. CPU time of
    that process, so that other work on the machine counts little.
    """
    connections = {name: _start(prepare) for name, prepare in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, connection in connections.items():
            connection.send("go")
            seconds[name].append(connection.recv())
    return {name: values[1:] for name, values in seconds.items()}


def _start(prepare: Callable[[], Work]) -> Connection:
    ours, theirs = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")
    fork.Process(target=_take_turns, args=(prepare, theirs), daemon=True).start()
    return ours


def _take_turns(prepare: Callable[[], Work], connection: Connection) -> None:
    work = prepare()
    while connection.recv():
        start = time.process_time()
        work()
        connection.send(time.process_time() - start)


def summary(subject: str, seconds: dict[str, list[float]], images: int) -> list[dict]:
    """One row a way: median milliseconds per image, median of its ratios to the first way."""
    base = next(iter(seconds.values()))
    return [
        {
            "subject": subject,
            "way": name,
            "ms_per_image": round(1e3 * statistics.median(values) / images, 3),
            "ratio": round(statistics.median(b / v for v, b in zip(values, base, strict=True)), 2),
            "rounds_s": [round(v, 4) for v in values],
        }
        for name, values in seconds.items()
    ]


def write(name: str, title: str, note: str, rows: list[dict], **more: object) -> None:
    """results/`name`.json and .md."""
    target = ROOT / "results" / name
    made = provenance()
    record = {"provenance": made, **more, "rows": rows}
    target.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    lines = [f"# {title}", "", f"{made} {note}", ""]
    lines += ["| | way | CPU ms / image | times as fast |", "|---|---|---:|---:|"]
    lines += [
        f"| {r['subject']} | {r['way']} | {r['ms_per_image']:.2f} | {r['ratio']:.2f} |"
        for r in rows
    ]
    text = "\n".join(lines) + "\n"
    Path(target.with_suffix(".md")).write_text(text, encoding="utf-8")
    print(text)
