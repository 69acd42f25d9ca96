"""Robust accuracy of trained networks under many attacks, with 95 % intervals:

    python benchmarks/robust.py path/to/miniplaces10 logs/RUN [logs/RUN ...] [--images 200]
    python benchmarks/robust.py path/to/cifar10 --train 8000 --epochs 6

The first looks at the best networks of runs of main.py, the second trains SimpleNet on 32 x 32
images, once as usual and once in each mode of adversarial training. Both write a section of
results/robustness.md with a column for each network, and what the health lights of PGD-20 warn of.
ε of l_inf: 4/255.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from results_file import provenance, write_section
from small_images import BATCH, PIXELS, load, train
from torch import Tensor, nn
from trained import best_network, interval, validation_images
from training import command_of

from deepvision.attacks import (
    APGD,
    PGD,
    Attack,
    InputScale,
    Square,
    accuracy_under_attack,
    add_random_noise,
    run_diagnostics,
)
from deepvision.evaluation.sweep import format_budget
from deepvision.training.objectives import STEPS, AdversarialTraining, standard


def attacks(pixels: InputScale, side: int) -> dict[str, Attack]:
    """l_2 and l_1 as large as l_inf's 4/255 would be if it moved a 16th of the pixels so far."""
    d = 3 * side * side
    options = {"pixels": pixels, "early_stop": True}
    l2, l1 = round(4 * d**0.5 / 4), round(4 * d / 16)
    return {
        "FGSM": PGD(epsilon=4, steps=1, step_size=4, **options),
        "PGD-10": PGD(epsilon=4, steps=10, **options),
        "PGD-20": PGD(epsilon=4, steps=20, **options),
        "PGD-50": PGD(epsilon=4, steps=50, **options),
        "PGD-20, margin": PGD(epsilon=4, steps=20, loss="margin", **options),
        "APGD-20, DLR": APGD(epsilon=4, steps=20, loss="dlr", **options),
        "Square, 200 queries": Square(epsilon=4, pixels=pixels),
        f"PGD-20, l_2, {l2}/255": PGD(norm="l2", epsilon=l2, steps=20, **options),
        f"APGD-20, l_1, {l1}/255": APGD(norm="l1", epsilon=l1, steps=20, **options),
    }


def row_values(
    model: nn.Module, x: Tensor, y: Tensor, pixels: InputScale, wanted: list[str]
) -> Iterator[tuple]:
    """(name, accuracy in per cent, seconds) of one network, line by line."""
    yield "clean", accuracy_under_attack(model, None, x, y), 0.0
    yield (
        "noise of the same size",
        accuracy_under_attack(model, None, add_random_noise(x, PGD(epsilon=4, pixels=pixels)), y),
        0.0,
    )
    for name, attack in attacks(pixels, x.shape[-1]).items():
        if wanted and name not in wanted:
            continue
        start = time.perf_counter()
        found = accuracy_under_attack(model, attack, x, y)
        yield name, found, time.perf_counter() - start


def of_runs(args: argparse.Namespace) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    models = dict(best_network(run, args.data) for run in args.runs)
    return models, *validation_images(args.data, args.images)


def how_trained(run: Path) -> str:
    """A line of Markdown: the run, and the command it was trained by."""
    config = json.loads((run / "config.json").read_text())
    command = command_of(config["kind"], config["arguments"])
    return f"- {run.name}: `{command}`, commit {config['commit']}"


def trained_here(args: argparse.Namespace) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    train_set = load(args.data / "train", args.train)
    steps = args.epochs * (args.train // BATCH)
    objectives = {"plain": standard}
    for mode in STEPS:
        options = {"steps": STEPS[mode], "ramp": (steps // 4, 3 * steps // 4)}
        objectives[mode] = AdversarialTraining(mode=mode, pixels=PIXELS, **options)
    models = {}
    for name, objective in objectives.items():
        models[name] = train(objective, *train_set, args.epochs, seed=0)
        print("trained", name, flush=True)
    return models, *load(args.data / "test", args.images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument(
        "--attack", action="append", default=[], help="one of the rows; default all"
    )
    parser.add_argument("--probed", type=int, default=100, help="images of the health lights")
    parser.add_argument("--train", type=int, default=8000, help="images, where there are no runs")
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    torch.manual_seed(0)
    models, x, y = (of_runs if args.runs else trained_here)(args)
    every = max(1, len(y) // args.probed)  # small images come category by category
    probed, columns, lights = (x[::every], y[::every]), {}, []
    for name, model in models.items():
        columns[name] = {}
        for line, found, seconds in row_values(model, x, y, PIXELS, args.attack):
            columns[name][line] = interval(len(y))(found)
            print(name, line, columns[name][line], f"{seconds:.0f} s", flush=True)
        attack = PGD(epsilon=4, steps=20, pixels=PIXELS)
        found = [light.line() for light in run_diagnostics(model, *probed, attack) if light.failed]
        lights += [f"- {name}: {line.strip()}" for line in found or ["no light warns"]]
    first = next(iter(columns.values()))
    table = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    table += [f"| {line} | {' | '.join(c[line] for c in columns.values())} |" for line in first]
    how = f", trained on {args.train} for {args.epochs} epochs" * (not args.runs)
    usual = format_budget("linf", 4, PIXELS.std)
    head = f"{len(y)} images{how}; untargeted; {usual} unless another is named."
    parts = [
        head,
        "",
        *table,
        "",
        *map(how_trained, args.runs),
        "",
        f"Health lights of PGD-20, {len(probed[1])} images:",
        "",
        *lights,
        "",
        provenance(),
    ]
    title = f"Accuracy in per cent under attack, {args.data.name}"
    write_section("robustness.md", title, "\n".join(parts))


if __name__ == "__main__":
    main()
