"""Add a run of benchmarks/speedrun.sh to results/speedrun.{json,md}, under its name.

python benchmarks/speedrun_row.py NAME logs/RUN
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from results_file import RESULTS
from training import summary

from deepvision.config import OneLineParser
from deepvision.runtime.jsonl import read_metrics

RECORD = RESULTS / "speedrun.json"
GOAL = 40.0  # top-1, in per cent
HEAD = "| run | epochs | top-1 | best top-1 | s to 40 % | s / epoch | seconds | images/s | device |"


def timed(name: str, run: Path) -> dict:
    """The run's summary, with the seconds of training and validation, in all and to the goal."""
    epochs = read_metrics(run / "metrics.jsonl")
    total, to_goal = 0.0, None
    for row in epochs:
        total += row["seconds"]
        if to_goal is None and row["val_top1_accuracy"] >= GOAL:
            to_goal = total
    times = {"seconds": total, "seconds_to_40": to_goal, "epoch_seconds": total / len(epochs)}
    return {"name": name, **times, **summary(run)}


def rounded(value: float | None) -> str:
    """A whole number; empty for None: a goal not reached, a speed not measured."""
    return "" if value is None else f"{value:.0f}"


def table(rows: list[dict]) -> str:
    """The rows in Markdown, with the origin of each."""
    lines = [HEAD, "|---|" + "---:|" * (HEAD.count("|") - 3) + "---|"]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['epochs']} | {row['top1']:.1f} | {row['best_top1']:.1f} | "
            f"{rounded(row['seconds_to_40'])} | {row['epoch_seconds']:.1f} | "
            f"{row['seconds']:.0f} | {rounded(row['images_per_second'])} | {row['device']} |"
        )
    origins = [
        f"- {r['name']}: `{r['command']}`, commit {r['commit']}, {r['started']}" for r in rows
    ]
    return "\n".join(["# Speedrun", "", *lines, "", *origins, ""])


def main(argv: Sequence[str]) -> None:
    """Replace the row of this name and write both files."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("name", help="of the row")
    parser.add_argument("run", type=Path, help="run folder")
    args = parser.parse_args(argv[1:])
    rows = json.loads(RECORD.read_text()) if RECORD.exists() else []
    rows = [row for row in rows if row["name"] != args.name] + [timed(args.name, args.run)]
    RECORD.write_text(json.dumps(rows, indent=2) + "\n")
    RECORD.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows[-1:]))


if __name__ == "__main__":
    main(sys.argv)
