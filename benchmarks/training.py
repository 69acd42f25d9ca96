"""Tell what training runs reached, from their own records:

    python benchmarks/training.py logs/RUN [logs/RUN ...]

Reads config.json, metrics.jsonl and evaluations.jsonl of each run folder and adds to
results/training.{json,md}: a row a run, with the command, commit, device and date it was made with.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))

from deepvision.config import build_parser  # noqa: E402
from deepvision.training import optim  # noqa: E402

RESULTS = ROOT / "results"
HEAD = "| run | epochs | top-1 | top-5 | best top-1 | mirrored | attacked | robust | images/s |"


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def command_of(kind: str, arguments: dict) -> str:
    """The command line that gives these arguments; of the data and weights their names alone."""
    parser = build_parser()
    usual = {name: parser.get_default(name) for name in arguments}
    usual |= optim.RECIPES.get(kind, optim.DEFAULTS)
    if not (arguments["pgd"] or arguments.get("at")):  # its default was 3, now it is the mode's
        arguments = {**arguments, "pgd_steps": usual["pgd_steps"]}
    if arguments.get("weights"):
        arguments = {**arguments, "weights": Path(arguments["weights"]).name}
    words = ["python main.py", Path(arguments["data_folder"]).name]
    for name, value in arguments.items():
        if name not in ("data_folder", "kind", "resume") and value != usual[name]:
            flag = "--" + name.replace("_", "-")
            words.append(flag if value is True else f"{flag}={value}")
    return " ".join(words)


def summary(run: Path) -> dict:
    """One run's figures; accuracies in per cent, on the validation set."""
    config = json.loads((run / "config.json").read_text())
    epochs, looks = rows_of(run / "metrics.jsonl"), rows_of(run / "evaluations.jsonl")
    last = epochs[-1]
    usual = [look for look in looks if "attack" not in look]  # by default_attack, if by any
    latest = {name: value for look in usual for name, value in look.items()}
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
        "command": command_of(config["kind"], config["arguments"]),
        "started": run.name.partition("_exp_")[2],
        **{key: config[key] for key in ("commit", "device", "torch")},
    }


def table(rows: list[dict]) -> str:
    lines = [HEAD, "|---|" + "---:|" * (HEAD.count("|") - 2)]
    names = ["top1", "top5", "best_top1", "mirrored_top1", "attacked_top1", "robust_top1"]
    names += ["images_per_second"]
    for i, row in enumerate(rows, 1):
        numbers = (f"{row[n]:.1f}" if row.get(n) is not None else "" for n in names)
        lines.append(f"| {i}. {row['kind']} | {row['epochs']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    known = {row["run"]: row for row in json.loads((RESULTS / "training.json").read_text())}
    known |= {run.name: summary(run) for run in parser.parse_args().runs}
    rows = sorted(known.values(), key=lambda row: row["started"])
    made = [
        f"{i}. {r['kind']}: `{r['command']}`, commit {r['commit']}, {r['device']}, "
        f"torch {r['torch']}, {r['started']}"
        for i, r in enumerate(rows, 1)
    ]
    what = (
        "Accuracies in per cent; robust: under PGD-10 after the last epoch of adversarial training."
    )
    text = f"# Training runs\n\n{what}\n\n{table(rows)}\n\n" + "\n".join(made)
    (RESULTS / "training.md").write_text(text + "\n")
    (RESULTS / "training.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
