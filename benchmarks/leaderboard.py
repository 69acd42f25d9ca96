"""Make results/leaderboard.md from the run folders in results/runs/.

    python benchmarks/leaderboard.py                          # the table
    python benchmarks/leaderboard.py --add NAME=RUN ...       # first copy the records of runs

--add copies the records of a run folder, without its weights, to results/runs/NAME; the rows of an
evaluation folder (of -e or -a with --weights) are appended to those of the run NAME.
results/runs/notes.json holds what older records lack, others.json known results of others.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from results_file import RESULTS, ROOT, origin, origin_line

from custom_transforms import IMAGENET_MEAN, IMAGENET_STD
from deepvision.attacks import PGD, InputScale
from deepvision.config import SETTINGS, OneLineParser, spelled
from deepvision.evaluation.statistics import wilson
from deepvision.evaluation.sweep import describe
from deepvision.models.registry import NETWORK_NAMES, create_model
from deepvision.models.scene_net import SHAPES, Shape
from deepvision.reporting.analysis import count_flops, count_parameters
from deepvision.runtime.jsonl import read_json, read_jsonl, read_metrics
from deepvision.runtime.provenance import command_line

RUNS = RESULTS / "runs"
RECORDS = ("config.json", "metrics.jsonl", "evaluations.jsonl", "events.out.tfevents.*")
SCALE = InputScale("255", IMAGENET_MEAN, IMAGENET_STD)
PGD20 = describe(PGD(norm="linf", epsilon=4.0, steps=20, pixels=SCALE))
FIRST = 5  # rows in the README
HEAD = (
    "| network | training images | epochs | top-1 | top-5 | mirrored: top-1 | top-5 | "
    "assignment's attack | PGD-20, 4/255 | parameters | GFLOPs | time | device |"
)
SHORT_HEAD = "| network | training images | epochs | top-1 | top-5 | parameters | time, device |"


def add(name: str, source: Path) -> None:
    """Copy a run's records to results/runs/NAME, or append an evaluation folder's rows."""
    target = RUNS / name
    if not (source / "metrics.jsonl").exists():
        with open(target / "evaluations.jsonl", "a") as file:
            file.write((source / "evaluations.jsonl").read_text())
        return
    target.mkdir(parents=True, exist_ok=True)
    for pattern in RECORDS:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def read_record(name: str) -> dict:
    """The figures of the run in results/runs/NAME: what its files say, else what the notes say."""
    run, notes = RUNS / name, read_json(RUNS / "notes.json").get(name, {})
    config, epochs = read_json(run / "config.json"), read_metrics(run / "metrics.jsonl")
    data, kind = config.get("data", {}), config.get("kind") or "torch_conv"
    best = max(epochs, key=lambda row: row["val_top1_accuracy"])
    settings = config["arguments"]
    history = config.get("history") or [config]  # the first part's settings name the network
    recipe = notes.get("recipe") or settings.get("recipe")
    shape = config.get("shape") or notes.get("shape")
    shape = Shape.load(shape) if shape else SHAPES.get(recipe)
    model = create_model(kind, data.get("classes", 100), shape=shape).eval()
    return {
        "name": name,
        "network": NETWORK_NAMES[kind] + version(kind, recipe, shape),
        "at": settings.get("at"),
        "data": data.get("folder") or notes["data"],
        "train": data.get("train") or notes["train"],
        "val": data.get("val") or notes["val"],
        "epochs": len(epochs),
        "planned": settings["epochs"],
        "plain_top1": best["val_top1_accuracy"],
        "plain_top5": best["val_top5_accuracy"],
        "parameters": count_parameters(model),
        "flops": count_flops(model),
        "seconds": sum(row["seconds"] for row in epochs),
        "device": config["device"],
        "commit": config.get("commit") or notes["commit"],
        "date": config.get("date") or notes["date"],
        "command": command_of(history[0]["arguments"]),
        **evaluated(read_jsonl(run / "evaluations.jsonl") + notes.get("evaluations", [])),
    }


def version(kind: str, recipe: str | None, shape: Shape | None) -> str:
    """What distinguishes a SceneNet from one of the default recipe; empty for other networks."""
    if recipe:
        return f", --recipe={recipe}" + (", earlier shape" if shape != SHAPES[recipe] else "")
    return ", first version" if kind == "scene_net" and shape is None else ""


def evaluated(rows: list[dict]) -> dict:
    """The figures of -e and -a, each from the row with the most images, the latest of equals."""
    found, sizes = {}, {}
    for row in rows:
        images, attack = row.get("images", 0), row.get("attack")
        names = ["mirrored_top1", "mirrored_top5", "views"]
        names += ["attacked_top1"] if attack in (None, PGD20) else []
        for name in names:
            key = "pgd20_top1" if attack else name
            if name in row and images >= sizes.get(key, 0):
                found[key], sizes[key] = row[name], images
    return found | {f"{key}_images": n for key, n in sizes.items()}


def command_of(settings: dict) -> str:
    """A command with all settings of a run, whatever the recipes set later."""
    words = ["python", "main.py", settings["data_folder"]]
    for name, value in settings.items():
        if name in SETTINGS and name not in ("data_folder", "resume") and value != SETTINGS[name]:
            words.append(spelled(name) if value is True else f"{spelled(name)}={value}")
    return shlex.join(words)


def interval(percent: float | None, n: int | None) -> str:
    """An accuracy over n images with its 95 % interval; empty where it was not measured."""
    if percent is None or not n:
        return ""
    low, high = wilson(percent * n / 100, n)
    return f"{percent:.1f} [{low:.1f}, {high:.1f}]"


def duration(seconds: float) -> str:
    """Minutes, or hours from two on."""
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def epochs_of(r: dict) -> str:
    """The epochs done, with the planned ones of a run that has not ended."""
    return f"{r['epochs']}" + (f" of {r['planned']}" if r["epochs"] < r["planned"] else "")


def cells(r: dict) -> list[str]:
    """A row of the table."""
    measured = [
        interval(r.get(key), r.get(f"{key}_images"))
        for key in ("mirrored_top1", "mirrored_top5", "attacked_top1", "pgd20_top1")
    ]
    return [
        r["network"] + (f" + {r['at']}" if r["at"] else ""),
        f"{r['train']:,}",
        epochs_of(r),
        interval(r["plain_top1"], r["val"]),
        interval(r["plain_top5"], r["val"]),
        *measured,
        f"{r['parameters'] / 1e6:.2f} M",
        f"{r['flops'] / 1e9:.2f}",
        duration(r["seconds"]),
        r["device"],
    ]


def short_table(records: list[dict]) -> list[str]:
    """The first rows, for the README."""
    rows = [
        f"| {r['network']} | {r['train']:,} | {epochs_of(r)} | "
        f"{interval(r['plain_top1'], r['val'])} | {interval(r['plain_top5'], r['val'])} | "
        f"{r['parameters'] / 1e6:.1f} M | {duration(r['seconds'])}, {r['device']} |"
        for r in records[:FIRST]
    ]
    return [SHORT_HEAD, "|---|---:|---:|---:|---:|---:|---|", *rows]


def views_table(records: list[dict]) -> Iterator[str]:
    """Accuracy by view, for the runs that -e --views has evaluated."""
    measured = [r for r in records if "views" in r]
    for r in measured:
        yield f"\n{r['network']}, {r['train']:,} images, on {r['views_images']:,} images:\n"
        yield "| view, mirrored | top-1 | top-5 |"
        yield "|---|---:|---:|"
        for name, pair in r["views"].items():
            top1, top5 = (interval(value, r["views_images"]) for value in pair)
            yield f"| {name} | {top1} | {top5} |"


def others_table() -> Iterator[str]:
    """Known results of others."""
    yield "| network | epochs | top-1 | top-5 | parameters | source |"
    yield "|---|---:|---:|---:|---:|---|"
    for row in read_json(RUNS / "others.json")["rows"]:
        size = f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else ""
        yield (
            f"| {row['network']} | {row.get('epochs', '')} | {row['top1']} | {row['top5']} | "
            f"{size} | {row['source']} |"
        )


def write(command: str) -> None:
    """Write results/leaderboard.md, and its first rows into the README."""
    records = [read_record(path.parent.name) for path in RUNS.glob("*/metrics.jsonl")]
    records.sort(key=lambda r: (-r["train"], -r["plain_top1"]))
    text = ["# Leaderboard", ""]
    text += [
        "MiniPlaces, 100 categories, 128 pixels, in per cent with 95 % intervals (Wilson) over"
    ]
    text += ["the validation images. Top-1 and top-5 are the best epoch's by the course's view;"]
    text += ["attacks are on all images, or on as many as the intervals say.", "", HEAD]
    text += ["|---|" + "---:|" * 11 + "---|"]
    text += ["| " + " | ".join(cells(r)) + " |" for r in records]
    text += ["", "Commands:", ""]
    for r in records:
        text.append(
            f"- `{r['name']}`: `{r['command']}`, commit {r['commit']}, {r['date']}; "
            f"{r['train']:,} training and {r['val']:,} validation images of {r['data']}."
        )
    text += ["", "## More views", ""]
    text += ["The course's view crops the center of the image; `-e --views` also evaluates larger"]
    text += ["views of the whole image, and the mean of all.", *views_table(records)]
    text += ["", "## Known results of others", ""]
    text += ["On the same task, by the course's view; 100,000 training images.", ""]
    text += [*others_table(), "", f"Made by {origin_line(origin(command))}", ""]
    (RESULTS / "leaderboard.md").write_text("\n".join(text))
    readme = ROOT / "README.md"
    start, end = "<!-- leaderboard -->\n", "<!-- end of leaderboard -->"
    before, _, rest = readme.read_text().partition(start)
    after = rest.partition(end)[2]
    readme.write_text("\n".join([before + start, *short_table(records), "", end]) + after)


def main(argv: Sequence[str]) -> None:
    """Copy the records that --add names, then write the table."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--add", nargs="+", default=[], metavar="NAME=RUN", help="runs")
    for pair in parser.parse_args(argv[1:]).add:
        name, folder = pair.split("=", 1)
        add(name, Path(folder))
    write(command_line(argv))


if __name__ == "__main__":
    main(sys.argv)
