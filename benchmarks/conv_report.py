"""Write the results of benchmarks/conv.py as JSON, Markdown tables and a plot."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
from results_file import origin_line

TORCH, TORCH_LAST, UNFOLD = "nn.Conv2d", "nn.Conv2d, channels-last", "unfold"
OURS_NCHW, OURS = "ours, NCHW", "ours, channels-last"
COURSE = "nn.Conv2d, gradients of the weights too"  # the usual PGD step: loss.backward()


def write(result: dict, target: Path) -> None:
    """Write `target`.json, .md and .png; print the tables."""
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    plot(result, target.with_suffix(".png"))
    print(markdown(result))


def summary(result: dict) -> list[tuple[str, str, str]]:
    """The goals of CustomConv2d and the values measured: (quantity, goal, value)."""
    rows = []
    cuda = any("TF32" in title for title in result["training"])
    goal, goal_last = ("1.5", "1.5") if cuda else ("0.85", "1.15")
    for title, by_name in result["training"].items():
        ours, torchs = by_name[OURS], by_name[TORCH]
        vs_last = ours["ms"] / by_name[TORCH_LAST]["ms"]
        saved = ours["saved_bytes"] / torchs["saved_bytes"]
        rows += [
            (f"training step / {TORCH}; {title}", f"≤ {goal}", f"{ours['ratio']:.2f}"),
            (f"training step / {TORCH_LAST}; {title}", f"≤ {goal_last}", f"{vs_last:.2f}"),
            (f"bytes saved / {TORCH}; {title}", "≤ 1.00", f"{saved:.3f}"),
        ]
        if ours["peak_bytes"]:
            peak = ours["peak_bytes"] / torchs["peak_bytes"]
            rows.append((f"peak memory / {TORCH}; {title}", "≤ 1.05", f"{peak:.2f}"))
    for title, by_name in result["attack"].items():
        ratio = by_name[f"{OURS}, frozen"]["ratio"]
        rows.append((f"PGD step / {COURSE}; {title}", "≤ 0.60", f"{ratio:.2f}"))
    layers = [layer["implementations"] for layer in result["layers"]]
    error = {name: max(layer[name]["error"] for layer in layers) for name in (OURS, TORCH)}
    goal = f"≤ {error[TORCH]:.1e} ({TORCH})"
    rows.append(("largest relative error, float32", goal, f"{error[OURS]:.1e}"))
    return rows


def markdown(result: dict) -> str:
    """All tables."""
    lines = [
        "# CustomConv2d compared with nn.Conv2d",
        "",
        f"{origin_line(result)} Medians of interleaved rounds.",
        "",
        "| | goal | measured |",
        "|---|---:|---:|",
        *(f"| {what} | {goal} | {marked(goal, value)} |" for what, goal, value in summary(result)),
        "",
        "## A training step of SimpleNet",
        "",
        f"| | implementation | ms | / {TORCH} | MB saved | MB peak |",
        "|---|---|---:|---:|---:|---:|",
        *training_rows(result["training"]),
        "",
        "## A step of PGD on SimpleNet",
        "",
        "| | implementation | ms | ratio |",
        "|---|---|---:|---:|",
        *(
            f"| {title} | {name} | {row['ms']:.1f} | {row['ratio']:.2f} |"
            for title, by_name in result["attack"].items()
            for name, row in by_name.items()
        ),
        "",
        "## Forward and backward of single layers",
        "",
        f"Milliseconds of {TORCH}, the time of the others relative to it; bytes saved and largest "
        "relative error (outputs and gradients against float64), ours and then torch's. The first "
        "layer computes no gradient of its input, as in training.",
        "",
        *layer_rows(result["layers"]),
    ]
    return "\n".join(lines) + "\n"


def marked(goal: str, value: str) -> str:
    """The value, marked where it misses the goal: `≤ number`."""
    return value if float(value) <= float(goal.split()[1]) else f"**{value}, missed**"


def training_rows(training: dict[str, dict]) -> list[str]:
    """One row per setting and implementation."""
    return [
        f"| {title} | {name} | {row['ms']:.1f} | {row['ratio']:.2f} | "
        f"{row['saved_bytes'] / 1e6:.0f} | "
        + (f"{row['peak_bytes'] / 1e6:.0f} |" if row["peak_bytes"] else "– |")
        for title, by_name in training.items()
        for name, row in by_name.items()
    ]


def layer_rows(layers: list[dict]) -> list[str]:
    """One row per layer, with its table's head."""
    others = [name for name in layers[0]["implementations"] if name != TORCH]
    rows = [
        "| N | C_i → C_o, K / S, H | ms | " + " | ".join(others) + " | MB saved | error |",
        "|---:|---|" + "---:|" * (len(others) + 3),
    ]
    for layer in layers:
        by_name = layer["implementations"]
        ours, torchs = by_name[OURS], by_name[TORCH]
        rows.append(
            f"| {layer['N']} | {shape_name(layer['shape'], ' → ', ' / ')} | {torchs['ms']:.2f} | "
            + " | ".join(f"{by_name[name]['ratio']:.2f}" for name in others)
            + f" | {ours['saved_bytes'] / 1e6:.1f}, {torchs['saved_bytes'] / 1e6:.1f} | "
            f"{ours['error']:.1e}, {torchs['error']:.1e} |"
        )
    return rows


def shape_name(shape: dict[str, int], to: str = "→", over: str = "/") -> str:
    """A layer's shape as text: `C_i→C_o, K/S, H`."""
    return f"{shape['C_i']}{to}{shape['C_o']}, {shape['K']}{over}{shape['S']}, {shape['H']}"


def plot(result: dict, path: Path) -> None:
    """Horizontal bars: the time of each implementation relative to nn.Conv2d."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = dict(result["training"])
    for layer in result["layers"]:
        groups[shape_name(layer["shape"])] = layer["implementations"]
    figure, axis = plt.subplots(figsize=(10, 0.42 * len(groups) + 1), layout="constrained")
    colors = {TORCH_LAST: "#bbbbbb", UNFOLD: "#cc6677", OURS_NCHW: "#88ccee", OURS: "#4477aa"}
    for i, (name, color) in enumerate(colors.items()):
        at = [row + 0.2 * (i - 1.5) for row in range(len(groups))]
        ratios = [by_name[name]["ratio"] for by_name in groups.values()]
        axis.barh(at, ratios, height=0.2, color=color, label=name)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(yticks=range(len(groups)), yticklabels=groups, xlim=(0, 5))
    axis.set(xlabel=f"time / {TORCH} (NCHW)")
    axis.invert_yaxis()
    axis.legend(loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
