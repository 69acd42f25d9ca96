"""Read run folders: curves, settings, evaluations, and the trained network.

The course's code leaves event files and checkpoints. Ours adds config.json, metrics.jsonl and
evaluations.jsonl. metrics.jsonl has precedence, because event files round to 32 bits; epochs
that only the event files know (a course run that our code resumed) come from there.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from deepvision import checkpoint
from deepvision.models.registry import NETWORK_NAMES, load_network
from deepvision.runtime.jsonl import read_json, read_jsonl, read_metrics
from deepvision.runtime.provenance import ROOT
from utils import UserError

LOSS, LEARNING_RATE = "data/training_loss", "data/learning_rate"
ACCURACIES = ("top1_accuracy", "top5_accuracy")
SPLITS = ("train", "val")
ATTACKED = {"attack", "clean_top1", "attacked_top1", "lights"}  # keys of a row of -a
SWEPT = {"sweep", "probed"}
ROBUST = "robust_top1_accuracy"  # of adversarial training
EVENT_FILES = "events.out.tfevents.*"
SCALARS_ONLY = {"scalars": 0, "images": 1, "tensors": 1}  # 0: all of them
COURSE_KINDS = {  # `model_arch` of the course's checkpoints and names of its run folders
    "simplenet": "torch_conv",
    "CNN": "torch_conv",
    "CustomCNN": "custom_conv",
    "ResNet": "resnet18",
    "ViT": "vit",
}

logging.getLogger("tensorboard").setLevel(logging.CRITICAL)  # it logs each point that it purges

Curve = list[tuple[int, float]]  # (iteration or epoch, value)


@dataclass
class Run:
    """The records of one run; `label` names it in figures and tables."""

    folder: Path
    label: str
    loss: Curve  # by iteration
    lr: Curve
    accuracy: dict[tuple[str, str], Curve]  # ("top1_accuracy", "val"): by epoch, from 1
    seconds: float
    config: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)

    @property
    def val_top1(self) -> Curve:
        """Validation accuracy in per cent by epoch."""
        return self.accuracy["top1_accuracy", "val"]

    @property
    def robust_top1(self) -> Curve:
        """Validation accuracy under attack, recorded by adversarial training."""
        return column(self.rows, ROBUST)

    @property
    def last_epoch(self) -> int:
        """The last epoch with a validation accuracy, from 1."""
        return self.val_top1[-1][0]

    @property
    def best_epoch(self) -> int:
        """The epoch of the highest validation accuracy, the first of several."""
        return max(self.val_top1, key=lambda point: point[1])[0]

    @property
    def name(self) -> str:
        """A file name without suffix that follows from the label."""
        return re.sub(r"\W+", "_", self.label).strip("_")

    @property
    def arch(self) -> str | None:
        """The key of the network in the registry; None where the folder does not say."""
        kind = self.config.get("kind") or self.folder.name.partition("_exp_")[0]
        kind = COURSE_KINDS.get(kind, kind)
        return kind if kind in NETWORK_NAMES else None

    @property
    def network_name(self) -> str | None:
        """The name of the network in reports; None where the folder does not say."""
        return self.config.get("network") or NETWORK_NAMES.get(self.arch)

    @property
    def adversarial_mode(self) -> str | None:
        """`--at`: pgd, fgsm-rs, free or trades; None for standard training."""
        return self.setting("at") or ("pgd" if self.setting("pgd") else None)

    @property
    def data(self) -> dict:
        """folder, classes, train, val, fingerprint of the data set, as far as recorded."""
        recorded = self.config.get("data")
        if isinstance(recorded, dict):
            return recorded
        folder = self.setting("data_folder")
        return {"folder": Path(folder).name} if isinstance(folder, str) and folder else {}

    def at(self, epoch: int, accuracy: str) -> float:
        """A validation accuracy after this epoch; nan if it was not recorded."""
        return dict(self.accuracy[accuracy, "val"]).get(epoch, math.nan)

    def evaluation(self, name: str) -> float | None:
        """The latest value of this name from -e, or from -a with the default attack."""
        rows = (e for e in reversed(self.evaluations) if name in e and "attack" not in e)
        return next(rows, {}).get(name)

    def attacks(self) -> list[dict]:
        """The rows of -a with attacks set by flags, the latest of each attack."""
        rows = (e for e in self.evaluations if e.keys() >= ATTACKED)
        return list({e["attack"]: e for e in rows}.values())

    def sweep(self) -> dict | None:
        """The latest row with accuracies over ε and steps."""
        return next((e for e in reversed(self.evaluations) if e.keys() >= SWEPT), None)

    def mean(self, name: str) -> float | None:
        """The mean of a column of metrics.jsonl; None where it has none."""
        values = [value for _, value in column(self.rows, name)]
        return sum(values) / len(values) if values else None

    def largest(self, name: str) -> float | None:
        """The maximum of a column of metrics.jsonl; None where it has none."""
        return max((value for _, value in column(self.rows, name)), default=None)

    def setting(self, name: str) -> object:
        """The value of a flag; None where the run did not record it."""
        settings = self.config.get("arguments")
        return settings.get(name) if isinstance(settings, dict) else None

    def data_folder(self) -> Path | None:
        """The data folder of the run; None if it recorded none.

        A relative path starts at the folder that main.py was started in, which was not always
        recorded: code/, the project, the run's own project and the working folder are tried.
        """
        recorded = self.setting("data_folder")
        if not isinstance(recorded, str) or not recorded:
            return None
        projects = [ROOT, *self.folder.parents[1:2]]
        starts = [ROOT / "code", *projects, *(p / "code" for p in projects), Path.cwd()]
        places = [start / Path(recorded).expanduser() for start in starts]
        return next((p for p in places if (p / "images").is_dir()), places[0])

    @cached_property
    def network(self) -> nn.Module:
        """The best network of the run, on the CPU, in evaluation mode.

        Raises:
            UserError: there is no checkpoint, or it fits none of the networks in code/.
        """
        models = self.folder / "models"
        path = checkpoint.latest_valid(models, (checkpoint.BEST, checkpoint.LAST))
        if path is None:
            raise UserError(f"{models} holds no checkpoint that can be read")
        model, _ = load_network(checkpoint.load(path), path)
        return model.eval()


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read_runs(
    folders: Sequence[Path], on_error: Callable[[UserError], None] | None = None
) -> list[Run]:
    """Read run folders and label each run with its network, where needed with its start.

    on_error: called for each folder that is skipped; without it the error is raised.

    Raises:
        UserError: a folder is missing, is named twice, holds no curves or a damaged file; or
            none is left.
    """
    runs, counts = [], Counter()
    for folder in map(Path.resolve, folders):
        try:
            if folder in [run.folder for run in runs]:
                raise UserError(f"{folder} is named twice")
            runs.append(read_run(folder))
            counts[runs[-1].label] += 1
        except UserError as e:
            if on_error is None or not (runs or len(folders) > 1):
                raise
            on_error(e)
    if not runs:
        raise UserError("none of these folders is a run folder (logs/<kind>_exp_<date>)")
    label_runs(runs, counts)
    return runs


def label_runs(runs: Sequence[Run], counts: Counter) -> None:
    """Add the start of a run to its label where several have that label, then a number."""
    seen = Counter()
    for run in runs:
        if counts[run.label] > 1:
            run.label += " " + (run.folder.name.partition("_exp_")[2] or run.folder.name)
        seen[run.label] += 1
        if seen[run.label] > 1:  # folders of one name in two places
            run.label += f" ({seen[run.label]})"


def read_run(folder: Path) -> Run:
    """Read one run folder; see `read_runs`."""
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    rows = read_metrics(folder / "metrics.jsonl")
    accuracy = {
        (name, split): read_accuracy(folder, rows, name, split)
        for name in ACCURACIES
        for split in SPLITS
    }
    events = read_events(folder)
    run = Run(
        folder,
        folder.name.partition("_exp_")[0],
        points(events, LOSS),
        points(events, LEARNING_RATE),
        accuracy,
        wall_seconds(folder),
        read_json(folder / "config.json"),
        rows,
        read_jsonl(folder / "evaluations.jsonl"),
    )
    if not run.val_top1:
        raise UserError(
            f"{folder} holds no validation accuracy: it is no run folder (logs/<kind>_exp_<date>), "
            "or its run has not finished an epoch"
        )
    mode = f" + {run.adversarial_mode}" if run.adversarial_mode else ""
    run.label = (run.network_name or run.label) + mode
    return run


def read_accuracy(folder: Path, rows: list[dict], name: str, split: str) -> Curve:
    """Accuracy by epoch: metrics.jsonl, and event files for the epochs before its first row."""
    recorded = column(rows, f"{split}_{name}")
    first = min((epoch for epoch, _ in recorded), default=math.inf)
    tag, places = f"data/{name}", (folder / f"data_{name}_{split}", folder / split)
    logged = next(filter(None, (points(read_events(place), tag) for place in places)), [])
    return [(epoch, value) for epoch, value in logged if epoch < first] + recorded


def column(rows: list[dict], name: str) -> Curve:
    """A column of metrics.jsonl by epoch, without the rows that lack it."""
    return [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]


def read_events(place: Path) -> EventAccumulator | None:
    """The event files of a folder, or one of them; None where there are none."""
    files = [place] if place.is_file() else place.glob(EVENT_FILES)
    return EventAccumulator(str(place), SCALARS_ONLY).Reload() if any(files) else None


def points(events: EventAccumulator | None, tag: str) -> Curve:
    """The scalars of a tag by step; [] where there are none."""
    if events is None or tag not in events.Tags()["scalars"]:
        return []
    return [(point.step, point.value) for point in events.Scalars(tag)]


def wall_seconds(folder: Path) -> float:
    """The time that the training processes of a run took, without the time between them.

    Each process starts an event file in the folder itself. It lasts to its last point below
    `data/`, there or in a sub-folder; points of -e and -a have other tags.
    """
    own = [read_events(file) for file in folder.glob(EVENT_FILES)]
    starts = sorted(f.FirstEventTimestamp() for f in own if LOSS in f.Tags()["scalars"])
    curves = [read_events(place) for place in {f.parent for f in folder.glob(f"*/{EVENT_FILES}")}]
    moments = [
        point.wall_time
        for events in (*own, *curves)
        for tag in events.Tags()["scalars"]
        if tag.startswith("data/")
        for point in events.Scalars(tag)
    ]
    total = 0.0
    for start, end in pairwise([*starts, math.inf]):
        total += max((m for m in moments if start <= m < end), default=start) - start
    return total
