"""What a run folder tells: its curves, settings, findings and network.

A folder of the course's own code holds event files and checkpoints alone; ours adds config.json,
metrics.jsonl and evaluations.jsonl. Accuracies are taken from metrics.jsonl where it is there, as
event files round to 32 bits.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from deepvision import checkpoint
from deepvision.models import registry
from deepvision.runtime.run_logger import OF_THE_MACHINE
from utils import UserError

CODE = Path(__file__).resolve().parents[2]
LOSS, RATE = "data/training_loss", "data/learning_rate"
ACCURACIES = ("top1_accuracy", "top5_accuracy")
PARTS = ("train", "val")
COLUMNS = [f"{part}_{name}" for part in PARTS for name in ACCURACIES] + [*OF_THE_MACHINE]
ATTACKED = {"attack", "clean_top1", "attacked_top1", "lights"}  # a row of evaluations.jsonl
SWEPT = {"sweep", "probed"}
ROBUST = "robust_top1_accuracy"  # of adversarial training
EVENT_FILES = "events.out.tfevents.*"
EPOCH_FILES = f"data_*/{EVENT_FILES}"
SCALARS_ALONE = {"scalars": 0, "images": 1, "tensors": 1}  # 0: all of them

logging.getLogger("tensorboard").setLevel(logging.CRITICAL)  # it tells of each point it purges

Curve = list[tuple[int, float]]  # (iteration or epoch, value)


@dataclass
class Run:
    """One run; `label` is what figures and tables call it."""

    folder: Path
    label: str
    loss: Curve  # by iteration
    rate: Curve
    accuracy: dict[tuple[str, str], Curve]  # ("top1_accuracy", "val"): by epoch, from 1
    seconds: float
    config: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)

    @property
    def val_top1(self) -> Curve:
        return self.accuracy["top1_accuracy", "val"]

    @property
    def robust_top1(self) -> Curve:
        """Validation accuracy under attack, where the run was trained to withstand one."""
        return column(self.rows, ROBUST)

    @property
    def last_epoch(self) -> int:
        return self.val_top1[-1][0]

    @property
    def best_epoch(self) -> int:
        return max(self.val_top1, key=lambda point: point[1])[0]

    def at(self, epoch: int, accuracy: str) -> float:
        """A validation accuracy after this epoch, nan if it was not recorded."""
        return dict(self.accuracy[accuracy, "val"]).get(epoch, math.nan)

    def found(self, name: str) -> float | None:
        """The latest figure of this name that -e, or -a with the default attack, found."""
        rows = (e for e in reversed(self.evaluations) if name in e and "attack" not in e)
        return next(rows, {}).get(name)

    def attacks(self) -> list[dict]:
        """What -a found with attacks given by flags, the latest finding of each."""
        rows = (e for e in self.evaluations if e.keys() >= ATTACKED)
        return list({e["attack"]: e for e in rows}.values())

    def sweep(self) -> dict | None:
        """The latest finding with accuracies over ε and steps."""
        return next((e for e in reversed(self.evaluations) if e.keys() >= SWEPT), None)

    def mean(self, name: str) -> float | None:
        """The mean of a column of metrics.jsonl, None where it has none."""
        values = [value for _, value in column(self.rows, name)]
        return sum(values) / len(values) if values else None

    def largest(self, name: str) -> float | None:
        return max((value for _, value in column(self.rows, name)), default=None)

    def argument(self, name: str) -> object:
        """A flag's value, None where the run did not record it."""
        return (self.config.get("arguments") or {}).get(name)

    def data_folder(self) -> Path | None:
        """Where the run found its images; relative names start from code/, as main.py does."""
        recorded = self.argument("data_folder")
        return CODE / recorded if recorded else None

    @cached_property
    def network(self) -> nn.Module:
        """The best network of the run, on the CPU, to be looked at.

        Raises:
            UserError: there is no checkpoint, or it fits none of the networks in code/.
        """
        path = checkpoint.latest_valid(self.folder / "models", (checkpoint.BEST, checkpoint.LAST))
        if path is None:
            raise UserError(f"{self.folder / 'models'} holds no checkpoint that can be read")
        content = checkpoint.load(path)
        kind, classes = content.get("kind"), num_classes(content["state_dict"])
        if not isinstance(kind, str) or kind not in registry.MODEL_REGISTRY:
            kind = registry.infer_arch(content["state_dict"], classes)
        model = registry.create_model(kind, classes)
        checkpoint.load_weights(model, content, path)
        return model.eval()


def num_classes(state_dict: dict) -> int:
    """The rows of the last matrix, which in every classifier is that of its last layer."""
    matrices = [v for v in state_dict.values() if v.dim() == 2]
    if not matrices:
        raise UserError("the checkpoint has no linear layer, so it is no classifier")
    return len(matrices[-1])


def kind_of(folder: Path) -> str:
    return folder.name.partition("_exp_")[0]


def read_runs(folders: list[Path]) -> list[Run]:
    """Read them all; of several runs of a kind, each is labelled with when it began.

    Raises:
        UserError: a folder is none, is named twice, or holds no curves or a broken file.
    """
    folders = [folder.resolve() for folder in folders]
    kinds = [kind_of(folder) for folder in folders]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"{folder} is named twice")
    return [
        read_run(folder, kind if kinds.count(kind) == 1 else folder.name.replace("_exp_", " "))
        for folder, kind in zip(folders, kinds, strict=True)
    ]


def read_run(folder: Path, label: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    rows = read_rows(folder / "metrics.jsonl")
    accuracy = {
        (name, part): column(rows, f"{part}_{name}")
        or points(read_events(folder / f"data_{name}_{part}"), f"data/{name}")
        for name in ACCURACIES
        for part in PARTS
    }
    events = read_events(folder)
    run = Run(
        folder,
        label,
        points(events, LOSS),
        points(events, RATE),
        accuracy,
        wall_seconds(folder),
        read_json(folder / "config.json"),
        rows,
        read_lines(folder / "evaluations.jsonl"),
    )
    if not run.val_top1:
        raise UserError(
            f"{folder} holds no validation accuracy: it is no run folder (logs/<kind>_exp_<date>), "
            "or its run has not ended an epoch"
        )
    return run


def column(rows: list[dict], name: str) -> Curve:
    return [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]


def read_events(place: Path) -> EventAccumulator | None:
    """A folder's event files, or one of them; None where there are none."""
    files = [place] if place.is_file() else place.glob(EVENT_FILES)
    return EventAccumulator(str(place), SCALARS_ALONE).Reload() if any(files) else None


def points(events: EventAccumulator | None, tag: str) -> Curve:
    if events is None or tag not in events.Tags()["scalars"]:
        return []
    return [(point.step, point.value) for point in events.Scalars(tag)]


def wall_seconds(folder: Path) -> float:
    """How long the run's processes worked in all, by the clock times of what they wrote.

    Each process that trains begins an event file in the folder itself; the time between the end of
    one and the start of the next does not count.
    """
    own = [read_events(file) for file in folder.glob(EVENT_FILES)]
    starts = sorted(f.FirstEventTimestamp() for f in own if LOSS in f.Tags()["scalars"])
    epochs = [read_events(place) for place in {f.parent for f in folder.glob(EPOCH_FILES)}]
    moments = [
        point.wall_time
        for events in (*own, *epochs)
        for tag in events.Tags()["scalars"]
        for point in events.Scalars(tag)
    ]
    total = 0.0
    for start, end in pairwise([*starts, math.inf]):
        total += max((m for m in moments if start <= m < end), default=start) - start
    return total


def read_json(path: Path) -> dict:
    """The object in this file, {} where there is no file."""
    lines = read_text(path)
    return parse(path, lines) if lines else {}


def read_lines(path: Path) -> list[dict]:
    """The objects of a file that has one in each line, [] where there is no file."""
    return [parse(path, line) for line in read_text(path).splitlines()]


def read_rows(path: Path) -> list[dict]:
    """The rows of metrics.jsonl, of which each has its epoch and, for the rest, numbers or null."""
    rows = read_lines(path)
    for row in rows:
        values = [row.get("epoch"), *(row[name] for name in COLUMNS if row.get(name) is not None)]
        if not all(isinstance(value, (int, float)) for value in values):
            raise UserError(f"{path} is damaged: {str(row)[:60]!r} is no row of it")
    return rows


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from None


def parse(path: Path, text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise UserError(f"{path} is damaged: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: expected an object, got {text[:40]!r}")
    return value
