"""The report's figures: each function draws one and returns it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deepvision.reporting.analysis import Predictions
from deepvision.reporting.records import Curve, Run

WIDTH, DPI = 9.0, 160  # inches of a figure as wide as the text
PICTURE, PICTURE_DPI = 1.0, 128  # inches of a photograph: its 128 pixels are drawn one to one
INK, GREY, RULE = "#202124", "#5f6368", "#dadce0"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MAX_ANNOTATED, MAX_NAMED, SHOWN_CLASSES = 20, 40, 15

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
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, dpi=figure.dpi, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def colours(n: int) -> list:
    """Colours that colour-blind readers can tell apart (Okabe & Ito, 2008), as far as they go."""
    if n <= len(OKABE_ITO):
        return list(OKABE_ITO[:n])
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.95, n)))


# ---------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------


def learning_curves(runs: Sequence[Run]) -> Figure:
    """Loss and learning rate by iteration, top-1 and top-5 by epoch, all runs in each panel."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.4)
        axes = figure.subplots(2, 2)
        titles = ("Training loss", "Learning rate", "Top-1 accuracy, %", "Top-5 accuracy, %")
        for ax, title in zip(axes.flat, titles, strict=True):
            ax.set_title(title)
        for run, colour in zip(runs, colours(len(runs)), strict=True):
            draw_loss(axes[0, 0], run.loss, colour)
            draw(axes[0, 1], run.rate, color=colour)
            for ax, name in zip(axes[1], ("top1_accuracy", "top5_accuracy"), strict=True):
                draw(ax, run.accuracy[name, "train"], color=colour, linestyle="--", linewidth=1.2)
                draw(ax, run.accuracy[name, "val"], color=colour, marker="o", markersize=3)
            draw(axes[1, 0], run.robust_top1, color=colour, linestyle=":")
            best = run.at(run.best_epoch, "top1_accuracy")
            axes[1, 0].plot(run.best_epoch, best, "*", color=colour, markersize=11)
        for ax in axes[0]:
            ax.set_xlabel("iteration")
            ax.set_ylim(bottom=0)
        show_small_rates(axes[0, 1], runs)
        for ax in axes[1]:
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(handles=keys(runs), loc="outside upper center", ncols=6)
        return figure


def show_small_rates(ax, runs: Sequence[Run]) -> None:
    """A logarithmic axis where one run's rates would lie on the ground beside another's."""
    peaks = [max(rate for _, rate in run.rate) for run in runs if run.rate]
    if peaks and 0 < 10 * min(peaks) <= max(peaks):
        ax.set_yscale("log", nonpositive="mask")  # the warm-up starts at 0
        ax.set_ylim(min(peaks) / 100, 2 * max(peaks))


def keys(runs: Sequence[Run]) -> list[Line2D]:
    lines = [
        Line2D([], [], color=colour, linewidth=3, label=run.label)
        for run, colour in zip(runs, colours(len(runs)), strict=True)
    ]
    robust = Line2D([], [], color=GREY, linestyle=":", label="under attack")
    return [
        *lines,
        *([robust] if any(run.robust_top1 for run in runs) else []),
        Line2D([], [], color=GREY, marker="o", markersize=3, label="validation"),
        Line2D([], [], color=GREY, linestyle="--", linewidth=1.2, label="training"),
        Line2D([], [], color=GREY, marker="*", markersize=11, linestyle="", label="best epoch"),
    ]


def draw(ax, curve: Curve, **style) -> None:
    if curve:
        ax.plot(*zip(*curve, strict=True), **style)


def draw_loss(ax, curve: Curve, colour) -> None:
    """Each batch's loss faintly, and its smoothed course."""
    draw(ax, curve, color=colour, alpha=0.25, linewidth=0.8)
    values = smoothed([value for _, value in curve])
    draw(ax, [(i, v) for (i, _), v in zip(curve, values, strict=True)], color=colour)


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """The exponential moving average, its start unbiased (Kingma & Ba, 2015, section 3)."""
    mean, result = 0.0, []
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**i))
    return result


def sweep(points: Sequence[dict]) -> Figure:
    """Accuracy over ε, a curve for each number of steps; all begin at the clean accuracy."""
    clean = [(p["epsilon_255"], p["top1"]) for p in points if p["steps"] == 0]
    counts = sorted({p["steps"] for p in points} - {0})
    shades = matplotlib.colormaps["viridis"](np.linspace(0.9, 0, len(counts)))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.6, 6.6)
        ax = figure.subplots()
        for steps, shade in zip(counts, shades, strict=True):
            curve = [(p["epsilon_255"], p["top1"]) for p in points if p["steps"] == steps]
            label = f"{steps} step{'s' * (steps > 1)}"
            draw(ax, clean + curve, color=shade, marker="o", markersize=4, label=label)
        ax.set_xlabel("ε, in pixels of 0 to 255")
        ax.set_title("Top-1 accuracy, %")
        ax.set_ylim(bottom=0)
        ax.legend()
        return figure


# ---------------------------------------------------------------------------------------------
# Categories
# ---------------------------------------------------------------------------------------------


def class_accuracy(answers: dict[str, Predictions]) -> Figure:
    """A row a category, a dot a run; of many categories the best and the worst."""
    names = next(iter(answers.values())).names
    accuracy = np.stack([a.class_accuracy for a in answers.values()])  # (runs, K)
    order = np.argsort(accuracy.mean(0), kind="stable")
    if len(order) > MAX_NAMED:
        order = np.concatenate([order[:SHOWN_CLASSES], order[-SHOWN_CLASSES:]])
    with matplotlib.rc_context(STYLE):
        figure = new_figure(0.9 + 0.27 * len(order))
        ax = figure.subplots()
        y = np.arange(len(order))
        low, high = accuracy[:, order].min(0), accuracy[:, order].max(0)
        ax.hlines(y, low, high, color=RULE, linewidth=3, zorder=1)
        shifts = 0.16 * (np.arange(len(answers)) - (len(answers) - 1) / 2)  # equal dots apart
        for run, colour, row, shift in zip(
            answers, colours(len(answers)), accuracy, shifts, strict=True
        ):
            ax.plot(row[order], y + shift, "o", color=colour, markersize=6, label=run)
        ax.set_yticks(y, [names[i] for i in order])
        ax.set_ylim(-0.7, len(order) - 0.3)
        if len(order) < len(names):  # a dotted line where the others are left out
            ax.axhline(SHOWN_CLASSES - 0.5, color=GREY, linestyle=(0, (1, 3)))
        ax.set_xlim(-2, 102)
        ax.set_xlabel("validation images recognised, %")
        if len(answers) > 1:
            figure.legend(loc="outside upper center", ncols=4)
        return figure


def confusion(answers: Predictions) -> Figure:
    """Rows are the categories, columns what they were taken for, in per cent of the row."""
    k = len(answers.names)
    counts = answers.confusion
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = new_figure(5.4, 6.6)
        ax = figure.subplots()
        few = k <= MAX_ANNOTATED
        norm = PowerNorm(1.0 if few else 0.5, 0, 100)  # of many, single errors are faint
        image = ax.imshow(share, cmap="Blues", norm=norm)
        figure.colorbar(image, ax=ax, label="% of the category's images", shrink=0.8)
        if k <= MAX_NAMED:
            ax.set_xticks(range(k), answers.names, rotation=45, ha="right", rotation_mode="anchor")
            ax.set_yticks(range(k), answers.names)
        if few:
            for i, j in np.ndindex(share.shape):
                colour = "white" if share[i, j] > 55 else INK
                weight = "bold" if i == j else "normal"
                text = f"{share[i, j]:.0f}" if counts[i, j] else ""
                ax.text(j, i, text, ha="center", va="center", color=colour, weight=weight)
        ax.set_ylabel("category")
        ax.set_xlabel("taken for")
        ax.tick_params(length=0)
        return figure


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def picture_rows(rows: Sequence[tuple[str, Sequence[np.ndarray], Sequence[str]]]) -> Figure:
    """Rows of (title, images (H, W, 3), captions above them), the images square."""
    columns = max(len(images) for _, images, _ in rows)
    left, step, line = 1.15, PICTURE + 0.08, PICTURE + 0.28  # inches
    size = left + columns * step, len(rows) * line
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=PICTURE_DPI)
        for i, (title, images, captions) in enumerate(rows):
            bottom = size[1] - (i + 1) * line + 0.04
            for j, (image, caption) in enumerate(zip(images, captions, strict=True)):
                corner = (left + j * step) / size[0], bottom / size[1]
                ax = figure.add_axes((*corner, PICTURE / size[0], PICTURE / size[1]))
                ax.axis("off")
                ax.imshow(image, aspect="auto")
                ax.set_title(caption, fontsize=6.5, weight="normal", loc="center", pad=3)
            middle = (bottom + PICTURE / 2) / size[1]
            figure.text((left - 0.1) / size[0], middle, title, fontsize=8, ha="right", va="center")
        return figure
