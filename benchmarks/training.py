"""Summarise training runs from their records.

    python benchmarks/training.py [logs/RUN ...]        # without a run: the table again

Reads config.json, metrics.jsonl and evaluations.jsonl of each run folder. Writes
results/training.{json,md}: one row per run, with command, commit, device and date; rows of other
runs stay.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from results_file import RESULTS

from deepvision.config import OneLineParser
from deepvision.models.registry import NETWORK_NAMES
from deepvision.runtime.jsonl import read_json, read_jsonl, read_metrics
from deepvision.runtime.run_dir import kind_and_start

RECORD = RESULTS / "training.json"
# heading -> column of the record; accuracies in per cent
COLUMNS = {
    "top-1": "top1",
    "top-5": "top5",
    "best top-1": "best_top1",
    "mirror-averaged": "mirrored_top1",
    "under attack": "attacked_top1",
    "robust": "robust_top1",
    "images/s": "images_per_second",
}


def training_command(config: dict) -> str:
    """The commands of config.json: the start, and each resume that changed a setting."""
    first, *resumes = config.get("history") or [config]
    entries = [first, *(entry for entry in resumes if entry.get("changed"))]
    return "; ".join(entry.get("command") or "not recorded" for entry in entries)


def summary(run: Path) -> dict:
    """One run's row; accuracies in per cent, on the validation set."""
    config, epochs = read_json(run / "config.json"), read_metrics(run / "metrics.jsonl")
    evaluations = read_jsonl(run / "evaluations.jsonl")
    default = [row for row in evaluations if "attack" not in row]  # default_attack, or none
    latest = {name: value for row in default for name, value in row.items()}
    last = epochs[-1]
    return {
        "run": run.name,
        "kind": config["kind"],
        "epochs": last["epoch"],
        "top1": last["val_top1_accuracy"],
        "top5": last["val_top5_accuracy"],
        "best_top1": max(row["val_top1_accuracy"] for row in epochs),
        "mirrored_top1": latest.get("mirrored_top1"),
        "attacked_top1": latest.get("attacked_top1"),
        "robust_top1": last.get("robust_top1_accuracy"),
        "images_per_second": last["images_per_second"],
        "command": training_command(config),
        "started": kind_and_start(run)[1],
        **{key: config[key] for key in ("commit", "device", "torch")},
    }


def data_set(row: dict) -> str:
    """The folder of the run's data: the first argument of its command."""
    return Path(row["command"].split()[2]).name


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = [f"| run | data set | epochs | {' | '.join(COLUMNS)} |"]
    lines.append("|---|---|" + "---:|" * (1 + len(COLUMNS)))
    for i, row in enumerate(rows, 1):
        values = (row.get(column) for column in COLUMNS.values())
        cells = ("" if value is None else f"{value:.1f}" for value in values)
        name, data = NETWORK_NAMES[row["kind"]], data_set(row)
        lines.append(f"| {i}. {name} | {data} | {row['epochs']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Add the runs to the record and write both files."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders to add")
    args = parser.parse_args(argv[1:])
    by_run = {row["run"]: row for row in json.loads(RECORD.read_text())} if RECORD.exists() else {}
    by_run |= {run.name: summary(run) for run in args.runs}
    rows = sorted(by_run.values(), key=lambda row: row["started"])
    sources = [
        f"{i}. {r['kind']}: `{r['command']}`, commit {r['commit']}, {r['device']}, "
        f"torch {r['torch']}, {r['started']}"
        for i, r in enumerate(rows, 1)
    ]
    note = (
        "Accuracies in per cent; robust: under PGD-10 after the last epoch of adversarial "
        "training. Runs of the same command are at different commits, with other random numbers, "
        "so their accuracies differ. Images per second depend on the machine's other work.\n\n"
        "miniplaces10: ten categories of MiniPlaces, 9,000 training and 500 validation images; "
        "miniplaces100: all hundred, with 10,000 training and 5,000 validation images. "
        "Both have MiniPlaces' layout."
    )
    text = f"# Training runs\n\n{note}\n\n{table(rows)}\n\n" + "\n".join(sources)
    RECORD.with_suffix(".md").write_text(text + "\n")
    RECORD.write_text(json.dumps(rows, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv)
