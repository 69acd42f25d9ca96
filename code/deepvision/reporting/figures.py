"""The figures of the report: each function draws one and returns it."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deepvision.reporting.analysis import Predictions
from deepvision.reporting.records import Curve, Run

WIDTH, DPI = 9.0, 160  # inches of a figure as wide as the text
COLUMN = 5.2  # inches of a figure that is legible on a phone's screen
PICTURE, PICTURE_DPI = 1.0, 128  # inches of an image: its 128 pixels are drawn one to one
INK, GREY, RULE = "#202124", "#5f6368", "#dadce0"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLOCK, SHOWN_CLASSES = 16, 20
LABEL_CHARS, CAPTION_CHARS, TITLE_CHARS = 26, 17, 15  # of a line in a figure

STYLE = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A Figure without pyplot, which would keep it in memory and look for a screen."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, dpi=figure.dpi, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def colours(n: int) -> list:
    """n colours: up to 7 safe for colour-blind readers (Okabe & Ito, 2008), else viridis."""
    if n <= len(OKABE_ITO):
        return list(OKABE_ITO[:n])
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.95, n)))


def wrapped(text: str, chars: int) -> str:
    """The text in lines of at most `chars` characters; no word is cut."""
    return textwrap.fill(text, chars, break_long_words=False, break_on_hyphens=False)


def add_legend(figure: Figure, handles: Sequence) -> None:
    """A legend above the axes, in as many columns as fit the width."""
    widest = max(len(handle.get_label()) for handle in handles)
    inches = 0.085 * widest + 0.55  # a letter of 9.5 points is 0.08 inches wide on average
    columns = max(1, min(len(handles), int(figure.get_figwidth() / inches)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)


# ---------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------


def learning_curves(runs: Sequence[Run]) -> Figure:
    """Loss and learning rate by iteration, top-1 and top-5 by epoch, all runs in each panel."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.6)
        for ax, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            PANELS[panel](ax, runs)
        add_legend(figure, legend_handles(runs))
        return figure


def curve_panel(runs: Sequence[Run], panel: str) -> Figure:
    """One panel of the learning curves, by its key in PANELS."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.8, COLUMN)
        PANELS[panel](figure.subplots(), runs)
        add_legend(figure, legend_handles(runs, panel))
        return figure


def draw_loss_panel(ax: Axes, runs: Sequence[Run]) -> None:
    """The loss of each batch faintly, and its moving average."""
    for run, colour in zip(runs, colours(len(runs)), strict=True):
        draw(ax, run.loss, color=colour, alpha=0.25, linewidth=0.8)
        draw(ax, smoothed_curve(run.loss), color=colour)
    ax.set(title="Training loss", xlabel="iteration")
    ax.set_ylim(bottom=0)


def draw_lr_panel(ax: Axes, runs: Sequence[Run]) -> None:
    """The axis is logarithmic where one run's rates would be invisible next to another's."""
    for run, colour in zip(runs, colours(len(runs)), strict=True):
        draw(ax, run.lr, color=colour)
    ax.set(title="Learning rate", xlabel="iteration")
    ax.set_ylim(bottom=0)
    peaks = [max(lr for _, lr in run.lr) for run in runs if run.lr]
    if peaks and 0 < 10 * min(peaks) <= max(peaks):
        ax.set_yscale("log", nonpositive="mask")  # the warmup starts at 0
        ax.set_ylim(min(peaks) / 100, 2 * max(peaks))


def draw_accuracy_panel(name: str, title: str) -> Callable[[Axes, Sequence[Run]], None]:
    """A function that draws the panel of one accuracy; a star marks the best epoch."""

    def draw_panel(ax: Axes, runs: Sequence[Run]) -> None:
        for run, colour in zip(runs, colours(len(runs)), strict=True):
            draw(ax, run.accuracy[name, "train"], color=colour, linestyle="--", linewidth=1.2)
            draw(ax, run.accuracy[name, "val"], color=colour, marker="o", markersize=3)
            if name == "top1_accuracy":
                draw(ax, run.robust_top1, color=colour, linestyle=":")
                best = run.at(run.best_epoch, name)
                ax.plot(run.best_epoch, best, "*", color=colour, markersize=11)
        ax.set(title=title, xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)

    return draw_panel


PANELS: dict[str, Callable[[Axes, Sequence[Run]], None]] = {
    "loss": draw_loss_panel,
    "learning_rate": draw_lr_panel,
    "top1": draw_accuracy_panel("top1_accuracy", "Top-1 accuracy, %"),
    "top5": draw_accuracy_panel("top5_accuracy", "Top-5 accuracy, %"),
}


def legend_handles(runs: Sequence[Run], panel: str = "top1") -> list[Line2D]:
    """The legend of a panel: a colour per run, a line style per split."""
    lines = [
        Line2D([], [], color=colour, linewidth=3, label=run.label)
        for run, colour in zip(runs, colours(len(runs)), strict=True)
    ]
    if panel in ("loss", "learning_rate"):
        return lines
    lines += [
        Line2D([], [], color=GREY, marker="o", markersize=3, label="validation"),
        Line2D([], [], color=GREY, linestyle="--", linewidth=1.2, label="training"),
    ]
    if panel == "top1":
        lines.append(
            Line2D([], [], color=GREY, marker="*", markersize=11, ls="", label="best epoch")
        )
        if any(run.robust_top1 for run in runs):
            lines.append(Line2D([], [], color=GREY, linestyle=":", label="under attack"))
    return lines


def panel_series(runs: Sequence[Run], panel: str) -> list[tuple[str, Curve]]:
    """The curves of a panel by name, as the page shows their values."""
    series = []
    for run in runs:
        if panel == "loss":
            series.append((run.label, smoothed_curve(run.loss)))
        elif panel == "learning_rate":
            series.append((run.label, run.lr))
        else:
            for split, name in (("val", "validation"), ("train", "training")):
                series.append((f"{run.label}, {name}", run.accuracy[f"{panel}_accuracy", split]))
            if panel == "top1":
                series.append((f"{run.label}, under attack", run.robust_top1))
    return [(name, curve) for name, curve in series if curve]


def draw(ax: Axes, curve: Curve, **style) -> None:
    """Plot a curve, if it has points."""
    if curve:
        ax.plot(*zip(*curve, strict=True), **style)


def smoothed_curve(curve: Curve) -> Curve:
    """The moving average of a curve, at the same x."""
    values = smoothed([value for _, value in curve])
    return [(i, v) for (i, _), v in zip(curve, values, strict=True)]


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """The exponential moving average without initialisation bias (Kingma & Ba, 2015, section 3)."""
    mean, result = 0.0, []
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**i))
    return result


def sweep(points: Sequence[dict]) -> Figure:
    """Accuracy over ε, one curve per number of steps; all start at the clean accuracy."""
    clean = [(p["epsilon_255"], p["top1"]) for p in points if p["steps"] == 0]
    counts = sorted({p["steps"] for p in points} - {0})
    shades = matplotlib.colormaps["viridis"](np.linspace(0.9, 0, len(counts)))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.6, COLUMN)
        ax = figure.subplots()
        for steps, shade in zip(counts, shades, strict=True):
            curve = [(p["epsilon_255"], p["top1"]) for p in points if p["steps"] == steps]
            label = f"{steps} step{'s' * (steps > 1)}"
            draw(ax, clean + curve, color=shade, marker="o", markersize=4, label=label)
        ax.set_xlabel("ε, in 8-bit intensity levels")
        ax.set_title("Top-1 accuracy, %")
        ax.set_ylim(bottom=0)
        ax.legend()
        return figure


# ---------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------


def class_accuracy(predictions: dict[str, Predictions]) -> Figure:
    """One row per class, one dot per run; of many classes the best and the worst.

    Classes without validation images are left out.
    """
    first = next(iter(predictions.values()))
    accuracy = np.stack([p.class_accuracy for p in predictions.values()])  # (runs, K)
    present = np.flatnonzero(np.isfinite(accuracy).all(0))
    order = present[np.argsort(accuracy[:, present].mean(0), kind="stable")]
    many = len(order) > 2 * SHOWN_CLASSES
    if many:
        order = np.concatenate([order[:SHOWN_CLASSES], order[-SHOWN_CLASSES:]])
    with matplotlib.rc_context(STYLE):
        names = [wrapped(first.names[i], LABEL_CHARS) for i in order]
        rows = sum(1 + 0.5 * name.count("\n") for name in names)
        figure = new_figure(1.1 + 0.2 * rows, COLUMN)
        ax = figure.subplots()
        draw_dots(ax, predictions, accuracy[:, order])
        ax.set_yticks(range(len(order)), names, fontsize=8)
        ax.set_ylim(-0.7, len(order) - 0.3)
        if many:
            ax.axhline(SHOWN_CLASSES - 0.5, color=GREY, linestyle=(0, (1, 3)))
            ax.set_title(
                f"{SHOWN_CLASSES} best and {SHOWN_CLASSES} worst of {len(present)} classes"
            )
        ax.set_xlim(-2, 102)
        ax.set_xlabel("accuracy, %")
        if len(predictions) > 1:
            add_legend(figure, ax.get_legend_handles_labels()[0])
        return figure


def draw_dots(ax: Axes, runs: Sequence[str], accuracy: np.ndarray) -> None:
    """The accuracies (runs, rows) of each row, with a grey line from the least to the largest."""
    y = np.arange(accuracy.shape[1])
    ax.hlines(y, accuracy.min(0), accuracy.max(0), color=RULE, linewidth=3, zorder=1)
    shifts = 0.16 * (np.arange(len(runs)) - (len(runs) - 1) / 2)  # equal values do not overlap
    for run, colour, row, shift in zip(runs, colours(len(runs)), accuracy, shifts, strict=True):
        ax.plot(row, y + shift, "o", color=colour, markersize=5, label=run)


def block_classes(p: Predictions) -> list[int]:
    """The classes that have images, or the most confused of many."""
    return p.present.tolist() if len(p.present) <= BLOCK else p.confused_block(BLOCK)


def confusion_block(p: Predictions) -> Figure:
    """Percentages of the true class (row) with names, of `block_classes`."""
    classes = block_classes(p)
    share = percentages(p)[np.ix_(classes, classes)]
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "font.size": 8}):
        side = COLUMN + 1.4 if len(classes) > 10 else COLUMN
        figure = new_figure(side, side)
        ax = figure.subplots()
        image = ax.imshow(share, cmap="Blues", vmin=0, vmax=100)
        draw_colour_scale(figure, image, (0, 25, 50, 75, 100))
        names = [wrapped(p.names[i], LABEL_CHARS) for i in classes]
        ax.set_xticks(range(len(classes)), names, rotation=90)
        ax.set_yticks(range(len(classes)), names)
        for i, j in np.argwhere(share > 0):
            colour = "white" if share[i, j] > 55 else INK
            weight = "bold" if i == j else "normal"
            text = f"{share[i, j]:.0f}"
            ax.text(j, i, text, ha="center", va="center", color=colour, weight=weight, fontsize=7)
        ax.set(ylabel="true class", xlabel="predicted class")
        ax.tick_params(length=0)
        return figure


def confusion_matrix(p: Predictions) -> Figure:
    """The whole matrix of the classes that have images, in per cent of the true class (row)."""
    share = percentages(p)[np.ix_(p.present, p.present)]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = new_figure(COLUMN, COLUMN)
        ax = figure.subplots()
        norm = PowerNorm(0.5, 0, 100)  # single errors would be too faint on a linear scale
        image = ax.imshow(share, cmap="Blues", norm=norm, interpolation="nearest")
        draw_colour_scale(figure, image, (0, 2, 10, 25, 50, 100))
        ax.set(ylabel="true class", xlabel="predicted class", xticks=[], yticks=[])
        return figure


def draw_colour_scale(figure: Figure, image, ticks: Sequence[int]) -> None:
    """The colour bar of a confusion matrix; ticks in per cent."""
    label = "% of the images of the true class"
    figure.colorbar(image, ax=figure.axes, label=label, ticks=ticks, shrink=0.8)


def percentages(p: Predictions) -> np.ndarray:
    """(K, K): the confusion matrix in per cent of each row; 0 for a class without images."""
    return 100 * p.confusion / np.maximum(p.confusion.sum(1, keepdims=True), 1)


# ---------------------------------------------------------------------------------------------
# What the page shows under the pointer
# ---------------------------------------------------------------------------------------------


def axes_box(figure: Figure) -> list[float]:
    """Left, top, width and height of the first axes as shares of the figure."""
    figure.draw_without_rendering()  # the layout is known after drawing only
    box = figure.axes[0].get_position()
    return [round(v, 5) for v in (box.x0, 1 - box.y1, box.width, box.height)]


def curve_hover(figure: Figure, series: list[tuple[str, Curve]], x_name: str, unit: str) -> dict:
    """The values of curves by x; `figure` holds their axes."""
    box = axes_box(figure)
    curves = [
        {"name": name, "points": [[x, float(f"{y:.5g}")] for x, y in curve]}
        for name, curve in series
    ]
    limits = figure.axes[0].get_xlim()
    return {"kind": "curves", "box": box, "x": x_name, "unit": unit, "xlim": limits} | {
        "series": curves
    }


def cell_hover(figure: Figure, p: Predictions, classes: Sequence[int]) -> dict:
    """Names and counts of the confusion matrix of these classes, which `figure` shows."""
    counts = p.confusion[np.ix_(classes, classes)]
    cells = [[int(i), int(j), int(counts[i, j])] for i, j in np.argwhere(counts)]
    names, totals = [p.names[i] for i in classes], p.confusion.sum(1)[classes].tolist()
    return {"kind": "matrix", "box": axes_box(figure), "names": names} | {
        "totals": totals,
        "cells": cells,
    }


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def picture_rows(rows: Sequence[tuple[str, Sequence[np.ndarray], Sequence[str]]]) -> Figure:
    """Rows of (title, images (H, W, 3), captions above them), the images square."""
    columns = max(len(images) for _, images, _ in rows)
    captions = [[wrapped(c, CAPTION_CHARS) for c in row[2]] for row in rows]
    bands = [0.14 + 0.12 * max(c.count("\n") + bool(c) for c in row) for row in captions]
    left, step = 1.15, PICTURE + 0.1  # inches
    size = left + columns * step, len(rows) * (PICTURE + 0.04) + sum(bands)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=PICTURE_DPI)
        top = size[1]
        for (title, images, _), texts, band in zip(rows, captions, bands, strict=True):
            bottom = top - band - PICTURE
            for j, (image, caption) in enumerate(zip(images, texts, strict=True)):
                corner = (left + j * step) / size[0], bottom / size[1]
                ax = figure.add_axes((*corner, PICTURE / size[0], PICTURE / size[1]))
                ax.axis("off")
                ax.imshow(image, aspect="auto")
                ax.set_title(caption, fontsize=6.5, weight="normal", loc="center", pad=3)
            middle = (bottom + PICTURE / 2) / size[1]
            text = wrapped(title, TITLE_CHARS)
            figure.text((left - 0.1) / size[0], middle, text, fontsize=8, ha="right", va="center")
            top = bottom - 0.04
        return figure
