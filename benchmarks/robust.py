"""Measure the robust accuracy of trained networks under many attacks, with 95 % intervals.

    python benchmarks/robust.py path/to/miniplaces10 logs/RUN [logs/RUN ...] [--images 200]
    python benchmarks/robust.py path/to/cifar10 --train 8000 --epochs 6

The first command attacks the best networks of main.py's runs. The second trains SimpleNet on
32 x 32 images, by standard training and in each mode of adversarial training. Both write a section
of results/robustness.md: one column per network, and the diagnostics of PGD-20 that failed.
ε of l_inf is 4/255.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from results_file import origin, origin_line, write_section
from small_images import BATCH, SCALE, load, train
from torch import Tensor, nn
from trained import best_network, confidence_interval, validation_images
from training import training_command

from deepvision.attacks import (
    APGD,
    PGD,
    Attack,
    Square,
    accuracy_under_attack,
    add_random_noise,
    run_diagnostics,
)
from deepvision.config import OneLineParser
from deepvision.evaluation.sweep import format_budget
from deepvision.runtime.jsonl import read_json
from deepvision.runtime.provenance import command_line
from deepvision.training.objectives import STEPS, AdversarialTraining, Objective, Standard

EPSILON = 4  # of l_inf, in 8-bit intensity levels
Set = tuple[Tensor, Tensor]  # images (N, 3, H, W), normalised, and labels (N,)


def attacks(side: int) -> dict[str, Attack]:
    """The attacks by name, for images of side x side.

    The l_2 and l_1 balls are as large as if l_inf's ε moved one pixel in 16.
    """
    d = 3 * side * side
    options = {"pixels": SCALE, "early_stop": True}
    l2, l1 = round(EPSILON * (d / 16) ** 0.5), round(EPSILON * d / 16)
    return {
        "FGSM": PGD(epsilon=EPSILON, steps=1, step_size=EPSILON, **options),
        "PGD-10": PGD(epsilon=EPSILON, steps=10, **options),
        "PGD-20": PGD(epsilon=EPSILON, steps=20, **options),
        "PGD-50": PGD(epsilon=EPSILON, steps=50, **options),
        "PGD-20, margin": PGD(epsilon=EPSILON, steps=20, loss="margin", **options),
        "APGD-20, DLR": APGD(epsilon=EPSILON, steps=20, loss="dlr", **options),
        "Square, 200 queries": Square(epsilon=EPSILON, pixels=SCALE),
        f"PGD-20, l_2, {l2}/255": PGD(norm="l2", epsilon=l2, steps=20, **options),
        f"APGD-20, l_1, {l1}/255": APGD(norm="l1", epsilon=l1, steps=20, **options),
    }


def measure(model: nn.Module, x: Tensor, y: Tensor, names: list[str]) -> Iterator[tuple]:
    """(name, accuracy in per cent, seconds): clean, under noise, and under the attacks `names`."""
    yield "clean", accuracy_under_attack(model, None, x, y), 0.0
    x_noisy = add_random_noise(x, PGD(epsilon=EPSILON, pixels=SCALE))
    yield "noise of the same size", accuracy_under_attack(model, None, x_noisy, y), 0.0
    for name, attack in attacks(x.shape[-1]).items():
        if names and name not in names:
            continue
        start = time.perf_counter()
        robust = accuracy_under_attack(model, None, attack.perturb(model, x, y), y)
        yield name, robust, time.perf_counter() - start


def networks_of_runs(args: argparse.Namespace) -> tuple[dict[str, nn.Module], Set]:
    """The best networks of the runs by name, and validation images."""
    models = dict(best_network(run, args.data) for run in args.runs)
    return models, validation_images(args.data, args.images)


def train_networks(args: argparse.Namespace) -> tuple[dict[str, nn.Module], Set]:
    """Networks trained here, by mode, and test images."""
    train_set = load(args.data / "train", args.train)
    steps = args.epochs * (args.train // BATCH)
    objectives: dict[str, Objective] = {"standard": Standard()}
    for mode in STEPS:
        options = {"steps": STEPS[mode], "eps_warmup": (steps // 4, 3 * steps // 4)}
        objectives[mode] = AdversarialTraining(mode=mode, scale=SCALE, **options)
    models = {}
    for name, objective in objectives.items():
        models[name] = train(objective, *train_set, args.epochs, seed=0)
        print("trained", name, flush=True)
    return models, load(args.data / "test", args.images)


def describe_run(run: Path) -> str:
    """A line of Markdown: the run, the command and the commit that trained it."""
    config = read_json(run / "config.json")
    return f"- {run.name}: `{training_command(config)}`, commit {config['commit']}"


def accuracy_table(models: dict[str, nn.Module], x: Tensor, y: Tensor, names: list[str]) -> list:
    """Lines of Markdown: one column per network, one row per attack."""
    interval, columns = confidence_interval(len(y)), {}
    for model_name, model in models.items():
        column = columns[model_name] = {}
        for name, robust, seconds in measure(model, x, y, names):
            column[name] = interval(robust)
            print(model_name, name, column[name], f"{seconds:.0f} s", flush=True)
    rows = next(iter(columns.values()))
    return [
        f"| | {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
        *(f"| {row} | {' | '.join(c[row] for c in columns.values())} |" for row in rows),
    ]


def failed_diagnostics(models: dict[str, nn.Module], x: Tensor, y: Tensor) -> Iterator[str]:
    """Lines of Markdown: the diagnostics of PGD-20 that failed, by network."""
    attack = PGD(epsilon=EPSILON, steps=20, pixels=SCALE)
    for name, model in models.items():
        failed = [d.line().strip() for d in run_diagnostics(model, x, y, attack) if d.warns]
        yield from (f"- {name}: {line}" for line in failed or ["none failed"])


def main(argv: Sequence[str]) -> None:
    """Attack all networks and write the section."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("data", type=Path, help="data folder")
    parser.add_argument("runs", type=Path, nargs="*", help="run folders; none: train networks")
    parser.add_argument("--images", type=int, default=200, help="images under attack")
    parser.add_argument("--attack", action="append", default=[], help="a row; default: all")
    parser.add_argument("--diagnosed", type=int, default=100, help="images of the diagnostics")
    parser.add_argument("--train", type=int, default=8000, help="training images without runs")
    parser.add_argument("--epochs", type=int, default=6, help="epochs without runs")
    args = parser.parse_args(argv[1:])
    torch.manual_seed(0)
    models, (x, y) = (networks_of_runs if args.runs else train_networks)(args)
    every = max(1, len(y) // args.diagnosed)  # small images are sorted by class
    trained = "" if args.runs else f", trained on {args.train} for {args.epochs} epochs"
    ball = format_budget("linf", EPSILON, SCALE.std)
    parts = [
        f"{len(y)} images{trained}; untargeted; {ball} unless the row says otherwise.",
        "",
        *accuracy_table(models, x, y, args.attack),
        "",
        *map(describe_run, args.runs),
        "",
        f"Failed diagnostics of PGD-20, {len(y[::every])} images:",
        "",
        *failed_diagnostics(models, x[::every], y[::every]),
        "",
        origin_line(origin(command_line(argv))),
    ]
    title = f"Accuracy in per cent under attack, {args.data.name}"
    write_section("robustness.md", title, "\n".join(parts))


if __name__ == "__main__":
    main(sys.argv)
