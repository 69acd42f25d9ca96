"""Put a run of benchmarks/speedrun.sh into results/speedrun.{json,md}, by its name:

python benchmarks/speedrun_row.py NAME logs/RUN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from training import RESULTS, rows_of, summary

GOAL = 40.0  # per cent, top-1
HEAD = "| run | epochs | top-1 | best top-1 | s to 40 % | s / epoch | seconds | images/s | device |"


def timed(name: str, run: Path) -> dict:
    """What the run reached, and how fast: seconds are those of training and validation."""
    epochs = rows_of(run / "metrics.jsonl")
    total, to_goal = 0.0, None
    for row in epochs:
        total += row["seconds"]
        if to_goal is None and row["val_top1_accuracy"] >= GOAL:
            to_goal = total
    times = {"seconds": total, "seconds_to_40": to_goal, "epoch_seconds": total / len(epochs)}
    return {"name": name, **times, **summary(run)}


def whole(number: float | None) -> str:
    """Empty for what never was: the goal, or a step in an epoch that was stopped at its end."""
    return "" if number is None else f"{number:.0f}"


def table(rows: list[dict]) -> str:
    lines = [HEAD, "|---|" + "---:|" * (HEAD.count("|") - 3) + "---|"]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['epochs']} | {row['top1']:.1f} | {row['best_top1']:.1f} | "
            f"{whole(row['seconds_to_40'])} | {row['epoch_seconds']:.1f} | "
            f"{row['seconds']:.0f} | {whole(row['images_per_second'])} | {row['device']} |"
        )
    made = [f"- {r['name']}: `{r['command']}`, commit {r['commit']}, {r['started']}" for r in rows]
    return "\n".join(["# Speedrun", "", *lines, "", *made, ""])


def main() -> None:
    name, run = sys.argv[1], Path(sys.argv[2])
    record = RESULTS / "speedrun.json"
    rows = json.loads(record.read_text()) if record.exists() else []
    rows = [row for row in rows if row["name"] != name] + [timed(name, run)]
    record.write_text(json.dumps(rows, indent=2) + "\n")
    record.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows[-1:]))


if __name__ == "__main__":
    main()
