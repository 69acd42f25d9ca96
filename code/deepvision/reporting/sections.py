"""The sections of a report: each function makes one from runs, or from what networks answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure as Drawing
from torch import Tensor, nn

import student_code
from deepvision import checkpoint
from deepvision.evaluation import pictures
from deepvision.evaluation.saliency import grad_cam, saliency
from deepvision.reporting import figures
from deepvision.reporting.analysis import Predictions, Validation, count_flops, count_parameters
from deepvision.reporting.document import Figure, Section, Table, Text
from deepvision.reporting.records import Run
from deepvision.runtime.run_logger import HYPERPARAMETERS
from utils import UserError, relpath

NOT_TOLD = "–"
CONFUSED_PAIRS, EXAMPLES = 3, 5
SHOWN, FACTOR = 5, 10  # images, and how much their change is amplified


@dataclass
class FigureWriter:
    """The folder that figures are saved to."""

    folder: Path

    def add(self, name: str, drawing: Drawing, caption: str) -> Figure:
        file = self.folder / f"{name.replace(' ', '_')}.png"
        checkpoint.write_atomically(file, figures.png(drawing))
        return Figure(file, caption, drawing.get_figwidth() / figures.WIDTH)


@dataclass
class RunAnalysis:
    """A run, the validation images of its data folder, and its network's answers to them."""

    run: Run
    validation: Validation
    answers: Predictions


# ---------------------------------------------------------------------------------------------
# From the run folders alone
# ---------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return NOT_TOLD if value is None or value != value else f"{value:.2f} %"


def number(value: float | None, unit: str = "", digits: int = 0, scale: float = 1.0) -> str:
    return NOT_TOLD if value is None else f"{value / scale:,.{digits}f}{unit}"


def as_told(value: object) -> str:
    return NOT_TOLD if value is None else str(value)


def of_network(run: Run, count: Callable[[nn.Module], int]) -> int | None:
    try:
        return count(run.network)
    except UserError:
        return None


SUMMARY: dict[str, Callable[[Run], str]] = {
    "best top-1": lambda run: percent(run.at(run.best_epoch, "top1_accuracy")),
    "… with top-5": lambda run: percent(run.at(run.best_epoch, "top5_accuracy")),
    "… after epoch": lambda run: str(run.best_epoch),
    "final top-1": lambda run: percent(run.at(run.last_epoch, "top1_accuracy")),
    "final top-5": lambda run: percent(run.at(run.last_epoch, "top5_accuracy")),
    "top-1, mirror-averaged": lambda run: percent(run.found("mirrored_top1")),
    "top-1 under default attack": lambda run: percent(run.found("attacked_top1")),
    "epochs": lambda run: str(run.last_epoch),
    "wall time, h:mm:ss": lambda run: str(timedelta(seconds=round(run.seconds))),
    "images/s in training": lambda run: number(run.mean("images_per_second"), digits=1),
    "peak memory": lambda run: number(run.largest("peak_memory_bytes"), " MB", scale=1e6),
    "parameters": lambda run: number(of_network(run, count_parameters)),
    "MFLOPs an image": lambda run: number(of_network(run, count_flops), digits=1, scale=1e6),
}
SETTINGS = (*HYPERPARAMETERS, "momentum", "clip_grad", "amp", "at", "seed")
ORIGIN = ("device", "torch", "commit")


def summary(runs: Sequence[Run]) -> Section:
    head = ["", *(run.label for run in runs)]
    rows = [[name, *map(cell, runs)] for name, cell in SUMMARY.items()]
    note = (
        "Accuracies on the validation set; a dash where the folder does not tell. Wall time: what "
        "the run's processes worked, validation included. FLOPs: of the forward pass of one "
        "128 × 128 image, a multiply-add counted as two."
    )
    return Section("Summary", [Table(head, rows, note), *settings(runs)])


def settings(runs: Sequence[Run]) -> list[Table]:
    """How the runs were started, as far as they recorded it."""
    told = [run for run in runs if run.config]
    if not told:
        return []
    rows = [[name, *map(as_told, (run.argument(name) for run in told))] for name in SETTINGS]
    rows += [[name, *map(as_told, (run.config.get(name) for run in told))] for name in ORIGIN]
    return [Table(["settings", *(run.label for run in told)], rows)]


def curves(runs: Sequence[Run], album: FigureWriter) -> Section:
    caption = (
        "Loss of single mini-batches (faint) and its moving average; accuracies after each epoch, "
        "on augmented training images and on the validation set."
    )
    drawing = figures.learning_curves(runs)
    return Section("Learning curves", [album.add("curves", drawing, caption)])


def robustness(run: Run, album: FigureWriter) -> Section | None:
    """What -a found with attacks given by flags; None where it was not asked."""
    rows = [
        [e["attack"], percent(e["clean_top1"]), percent(e["attacked_top1"]), warnings_of(e)]
        for e in run.attacks()
    ]
    if not rows:
        return None
    head = ["attack", "clean top-1", "attacked top-1", "warnings"]
    note = "Warnings: health lights that say the attack was too weak, so that less is true."
    blocks = [Table(head, rows, note)]
    if e := run.sweep():
        caption = f"Accuracy of {run.label} under attack on {e['probed']} validation images."
        blocks.append(album.add(f"sweep_{run.label}", figures.sweep(e["sweep"]), caption))
    return Section(f"Robustness: {run.label}", blocks)


def warnings_of(evaluation: dict) -> str:
    return (
        ", ".join(light["name"] for light in evaluation["lights"] or [] if light["warns"]) or "none"
    )


def convolution(file: Path) -> Section | None:
    """Our convolution beside torch's, from what benchmarks/conv.py measured; None without it."""
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        tables = [
            Table(
                [case, "ms a step", "/ nn.Conv2d", "MB saved", "MB peak"],
                [way_row(*way) for way in ways.items()],
            )
            for case, ways in found["training"].items()
        ]
        made = f"{found['command']}, commit {found['commit']}, {found['date']}, {found['device']}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{file} is damaged: {e!r}") from None
    note = (
        "Forward, backward and optimizer's step of SimpleNet; saved: what the forward pass keeps "
        f"for the backward one. Measured by {made}."
    )
    return Section("Our convolution and torch's", [*tables, Text(note, note=True)])


def way_row(way: str, row: dict) -> list[str]:
    memory = (number(row.get(name), scale=1e6) for name in ("saved_bytes", "peak_bytes"))
    return [way, number(row["ms"]), number(row["ratio"], digits=2), *memory]


# ---------------------------------------------------------------------------------------------
# From the networks and the images
# ---------------------------------------------------------------------------------------------


def study(run: Run, data: Path | None, workers: int) -> RunAnalysis:
    """Ask a run's network about the validation images.

    Raises:
        UserError: there is no network or there are no images, or they do not fit each other.
    """
    folder = data or run.data_folder()
    if folder is None:
        raise UserError("the run recorded no data folder: name it with --data")
    network = run.network
    validation = Validation(Path(relpath(folder)), workers)
    validation.dataset.skip(checkpoint.skipped_images(run.config) or [])
    return RunAnalysis(run, validation, validation.ask(network, run.label))


def categories(studies: Sequence[RunAnalysis], album: FigureWriter) -> Section:
    groups: dict[
        tuple[str, ...], dict[str, Predictions]
    ] = {}  # runs on the same data share a figure
    for s in studies:
        groups.setdefault(tuple(s.answers.names), {})[s.run.label] = s.answers
    caption = "Share of each category's validation images that the network recognises."
    drawn = [
        album.add(f"categories{n or ''}", figures.class_accuracy(answers), caption)
        for n, answers in enumerate(groups.values())
    ]
    return Section("Accuracy by category", drawn)


def confusion(s: RunAnalysis, album: FigureWriter) -> Section:
    answers, label = s.answers, s.run.label
    names, totals = answers.names, answers.confusion.sum(1)
    caption = f"What {label} takes each category for, in per cent of the category's images."
    matrix = album.add(f"confusion_{label}", figures.confusion(answers), caption)
    pairs = answers.most_confused(CONFUSED_PAIRS)
    if not pairs:
        return Section(f"Confusion: {label}", [matrix, Text("Every image was recognised.")])
    table = Table(
        ["most confused", "images", "of"],
        [[f"{names[i]}, taken for {names[j]}", str(n), str(totals[i])] for i, j, n in pairs],
    )
    rows = []
    for i, j, _ in pairs:
        chosen = answers.examples(i, j, EXAMPLES)
        certain = [f"{names[j]} {100 * answers.confidence[n]:.0f} %" for n in chosen]
        rows.append((names[i], pictures.pixels(s.validation.images(chosen)[0]), certain))
    caption = "Images of these pairs: at the left the category, above each image the answer."
    shown = album.add(f"confused_{label}", figures.picture_rows(rows), caption)
    return Section(f"Confusion: {label}", [matrix, table, shown])


def explanations(s: RunAnalysis, album: FigureWriter) -> Section:
    """Attack and saliency on images that the network recognises, each of another category."""
    title = f"Single images: {s.run.label}"
    chosen = recognised(s.answers, SHOWN)
    if not chosen:
        return Section(title, [Text("No image was recognised.")])
    x, _ = s.validation.images(chosen)
    return Section(title, [attack_strips(s, x, album), saliency_strips(s, x, album)])


def attack_strips(s: RunAnalysis, x: Tensor, album: FigureWriter) -> Figure:
    """Images x (n, 3, H, W) before and after the default attack, and what it changed."""
    attack = student_code.default_attack(nn.CrossEntropyLoss())
    x_adv = attack.perturb(s.run.network, x.clone()).detach()
    change = pictures.pixels(pictures.difference(x, x_adv, FACTOR))
    rows = [
        ("clean", pictures.pixels(x), verdicts(s, x)),
        ("attacked", pictures.pixels(x_adv), verdicts(s, x_adv)),
        (f"change × {FACTOR}", change, [""] * len(x)),
    ]
    caption = (
        f"The default attack on images that {s.run.label} recognises; above each image the "
        "answer. The change is drawn around mid-grey."
    )
    return album.add(f"attack_{s.run.label}", figures.picture_rows(rows), caption)


def saliency_strips(s: RunAnalysis, x: Tensor, album: FigureWriter) -> Figure:
    """Images x (n, 3, H, W), and over them what the answers hang on."""
    seen, blank = pictures.pixels(x), [""] * len(x)
    maps = {"gradient": saliency(s.run.network, x)[0], "Grad-CAM": grad_cam(s.run.network, x)}
    rows = [("clean", seen, verdicts(s, x))]
    rows += [(name, pictures.overlay(seen, m), blank) for name, m in maps.items() if m is not None]
    caption = (
        "What the answer hangs on: the pixels whose change would change the loss most, and, of a "
        "convolutional network, where its last layer saw the category (Grad-CAM)."
    )
    return album.add(f"saliency_{s.run.label}", figures.picture_rows(rows), caption)


@torch.no_grad()
def verdicts(s: RunAnalysis, x: Tensor) -> list[str]:
    return pictures.format_predictions(s.run.network(x), s.answers.names)


def recognised(answers: Predictions, n: int) -> list[int]:
    """The first image recognised of each of up to n categories."""
    right = np.flatnonzero(answers.labels == answers.predictions)
    _, first = np.unique(answers.labels[right], return_index=True)
    return sorted(right[first].tolist())[:n]
