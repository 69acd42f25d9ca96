"""Matplotlib figures from the measurements of figures.py; each function returns one figure."""

from __future__ import annotations

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

VECTOR_GAIN = 8  # factor on attack and reversal vectors, around mid-grey
DPI = 110


def picture(x: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) side by side: (H, N W, 3)."""
    return np.concatenate(list(x.clamp(0, 1).permute(0, 2, 3, 1).numpy()), axis=1)


def strips(rows: dict[str, Tensor], title: str) -> plt.Figure:
    """One strip of images per name."""
    fig, axes = plt.subplots(len(rows), 1, figsize=(7, 1.25 * len(rows)), layout="constrained")
    for axis, (name, x) in zip(axes, rows.items(), strict=True):
        axis.imshow(picture(x), interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    fig.suptitle(title)
    return fig


def iterations(images: dict[str, Tensor], counts: tuple[int, ...]) -> plt.Figure:
    """Attacked images by norm and number of iterations."""
    rows = {
        f"{norm}, {k}": x
        for norm, by_iteration in images.items()
        for k, x in zip(counts, by_iteration, strict=True)
    }
    return strips(rows, "Attacked images by norm and iteration")


def vectors(images: dict[str, Tensor]) -> plt.Figure:
    """Original, attack vector, attacked, reversal vector, recovered."""
    rows = {
        f"{name} ×{VECTOR_GAIN}" if "vector" in name else name: (
            0.5 + VECTOR_GAIN * x if "vector" in name else x
        )
        for name, x in images.items()
    }
    return strips(rows, "Attack and reversal, l_inf")


def loss_curve(curves: dict[str, list[float]], n: int) -> plt.Figure:
    """Mean test loss against the iteration of the attack, for each norm."""
    fig, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, losses in curves.items():
        axis.plot(range(len(losses)), losses, marker=".", label=name)
    axis.set(xlabel="iteration of the attack", ylabel=f"mean test loss (n = {n})")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    return fig


def loss_histogram(losses: dict[str, list[float]]) -> plt.Figure:
    """Distribution of the contrastive loss, for each kind of images."""
    fig, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    bins = np.histogram_bin_edges(sum(losses.values(), []), 20)
    for name, values in losses.items():
        label = f"{name} (mean {np.mean(values):.2f})"
        axis.hist(values, bins, histtype="step", linewidth=1.5, label=label)
    axis.set(xlabel="contrastive loss on held-out views", ylabel="images")
    axis.legend()
    return fig


def heads_compared(rows: list[dict]) -> plt.Figure:
    """Held-out loss and reversed accuracy against the batch size of the head's training."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    similarities = dict.fromkeys(row["similarity"] for row in rows)
    for similarity, shift in zip(similarities, (0.94, 1.06), strict=True):  # so bars do not overlap
        mine = [row for row in rows if row["similarity"] == similarity]
        sizes = [row["batchsize"] for row in mine]
        left.plot(sizes, [row["held_out_loss"] for row in mine], marker="o", label=similarity)
        accuracy = np.array([row["reversed"] for row in mine])
        low, high = np.array([row["interval"] for row in mine]).T
        error = accuracy - low, high - accuracy
        right.errorbar(np.multiply(sizes, shift), accuracy, error, fmt="o", capsize=3)
    for axis in (left, right):
        axis.set(xscale="log", xlabel="batch size of the head's training")
        axis.set_xticks(sizes, labels=[str(size) for size in sizes])
        axis.minorticks_off()
    left.legend()
    left.set_ylabel("held-out contrastive loss")
    right.set_ylabel(f"accuracy after reversal, % (n = {rows[0]['n']})")
    return fig


def pixels(fig: plt.Figure) -> np.ndarray:
    """The drawn figure as uint8 RGB (H, W, 3)."""
    return np.asarray(fig.canvas.buffer_rgba())[..., :3].copy()
