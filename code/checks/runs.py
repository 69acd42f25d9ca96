"""Checks of training runs, from their run folders: ours and the course's.

Needs deepvision/, which reads event files; everything else in checks/ does not.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from checks.grading import Check, CheckFailed, Findings, Observation, Result, expect, judge

# What a run must have reached: a teacher may change it. Accuracies are top-1, in per cent.
SIMPLENET_TOP1, SIMPLENET_EPOCHS = 40.0, 60
CUSTOM_GAP = 2.0  # points below a run on nn.Conv2d with the same number of epochs; or
CUSTOM_TOP1, CUSTOM_EPOCHS = 20.0, 10
RESNET_TOP1 = 50.0
BONUS_GAP = 5.0  # points of robust accuracy above the plain network's

CHECKPOINTS = ("model_best.pth.tar", "checkpoint.pth.tar")
# The contract's SimpleNet
SIMPLENET = {f"features.{i}.{p}" for i in (0, 3, 5, 7, 10, 12, 14) for p in ("weight", "bias")}
SIMPLENET |= {"fc.weight", "fc.bias"}


@dataclass(frozen=True)
class TrainedRun:
    """What grading needs of a run folder."""

    name: str
    network: str  # simplenet, custom_conv, resnet18, vit, own, or '' if unknown
    top1: dict[int, float]  # by epoch, of the validation images
    has_loss: bool  # whether it holds a curve of the training loss
    robust: dict[str, float]  # top-1 under attack, by the attack
    adversarial: bool | None  # trained on adversarial samples; None if not recorded

    def best(self, epochs: int | None = None) -> float:
        """The best accuracy, within so many epochs."""
        within = [v for epoch, v in self.top1.items() if epochs is None or epoch <= epochs]
        return max(within, default=0.0)


def read_runs(root: Path) -> tuple[list[TrainedRun], list[str]]:
    """The runs in `root`, or the run that `root` is; and a line for each folder that is none.

    Raises:
        CheckFailed: there is no such folder, or no deepvision/ to read it.
    """
    expect(root.is_dir(), f"there is no folder {root}")
    records = import_records()
    runs, skipped = [], []
    for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        try:
            runs.append(read_run(records, folder))
        except Exception as e:  # a broken file, or no run folder
            if folder != root and any(folder.glob("**/events.out.tfevents.*")):
                skipped.append(f"{folder.name} is skipped: {e}")
    return runs, skipped


def import_records() -> ModuleType:
    """The reader of run folders."""
    try:
        return importlib.import_module("deepvision.reporting.records")
    except ModuleNotFoundError as e:
        hint = f"no module {e.name}"
        raise CheckFailed("grading run folders needs deepvision/ next to it", hint) from None
    except Exception as e:  # deepvision imports student_code.py
        raise CheckFailed(f"deepvision/ cannot be imported: {type(e).__name__}: {e}") from None


def read_run(records: ModuleType, folder: Path) -> TrainedRun:
    """One folder."""
    run = records.read_run(folder)
    rows = [row for row in run.evaluations if "attacked_top1" in row]
    arguments = run.config.get("arguments") or {}
    known = {"pgd", "at"} & arguments.keys()
    return TrainedRun(
        folder.name,
        network_of(folder),
        dict(run.val_top1),
        bool(run.loss) or any("train_loss" in row for row in run.rows),
        {str(row.get("attack", "default")): row["attacked_top1"] for row in rows},
        any(arguments[name] for name in known) if known else None,
    )


def network_of(folder: Path) -> str:
    """The network of a run: by its checkpoint's keys and `model_arch`, and its folder's name."""
    content = next(filter(None, (load(folder / "models" / name) for name in CHECKPOINTS)), {})
    keys = {key.removeprefix("module.") for key in content.get("state_dict", {})}
    name = f"{folder.name} {content.get('model_arch', '')}".lower()
    if "layer1.0.conv1.weight" in keys or "resnet" in name:
        return "resnet18"
    if any("qkv" in key or "pos_embed" in key for key in keys) or "vit" in name:
        return "vit"
    if keys and keys != SIMPLENET:
        return "own"
    if "custom" in name:
        return "custom_conv"
    return "simplenet" if keys or "torch_conv" in name or "simple" in name else ""


def load(path: Path) -> dict[str, Any]:
    """A checkpoint, read as data only; {} if none can be read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError):
        return {}
    return content if isinstance(content, dict) else {}


# ---- Judging ---------------------------------------------------------------------------------


def of(runs: Sequence[TrainedRun], network: str) -> list[TrainedRun]:
    """The runs of a network, the best first.

    Raises:
        CheckFailed: there is none, or none with a curve of its training loss.
    """
    found = [run for run in runs if run.network == network]
    expect(bool(found), f"there is no run of {network} (with a checkpoint that says so)")
    curves = [run for run in found if run.has_loss]
    expect(bool(curves), f"{found[0].name} holds no curve of the training loss")
    return sorted(curves, key=lambda run: -run.best())


def judge_simplenet(runs: Sequence[TrainedRun], _: Findings) -> None:
    """SimpleNet reaches SIMPLENET_TOP1."""
    best = max(run.best(SIMPLENET_EPOCHS) for run in of(runs, "simplenet"))
    problem = f"SimpleNet reaches {best:.2f} % in {SIMPLENET_EPOCHS} epochs"
    expect(best >= SIMPLENET_TOP1, f"{problem}, expected {SIMPLENET_TOP1:g} %")


def judge_custom(runs: Sequence[TrainedRun], _: Findings) -> None:
    """A run on the custom convolution is as good as one on nn.Conv2d, or good after few epochs."""
    lines = []
    for run in of(runs, "custom_conv"):
        early = run.best(CUSTOM_EPOCHS)
        if early >= CUSTOM_TOP1:
            return
        lines.append(f"{run.name} reaches {early:.2f} % in {CUSTOM_EPOCHS} epochs")
        for other in (r for r in runs if r.network == "simplenet"):
            if max(other.top1) != max(run.top1):  # another number of epochs
                continue
            if run.best() >= other.best() - CUSTOM_GAP:
                return
            lines.append(f"{other.name} {other.best():.2f} %, {run.name} {run.best():.2f} %")
    raise CheckFailed(
        f"{'; '.join(lines)}: expected {CUSTOM_TOP1:g} % in {CUSTOM_EPOCHS} epochs, or at most "
        f"{CUSTOM_GAP:g} points below a run on nn.Conv2d with as many epochs"
    )


def judge_own(runs: Sequence[TrainedRun], _: Findings) -> None:
    """The student's network is above SimpleNet."""
    best = of(runs, "own")[0].best()
    simple = max((r.best() for r in runs if r.network == "simplenet"), default=SIMPLENET_TOP1)
    expect(best > simple, f"your own network reaches {best:.2f} %, expected above {simple:.2f} %")


def judge_resnet(runs: Sequence[TrainedRun], _: Findings) -> None:
    """ResNet-18 reaches RESNET_TOP1."""
    best = of(runs, "resnet18")[0].best()
    expect(best >= RESNET_TOP1, f"ResNet-18 reaches {best:.2f} %, expected {RESNET_TOP1:g} %")


def judge_bonus(runs: Sequence[TrainedRun], _: Findings) -> None:
    """A run is more robust than a plain one of the same network, under the same attack."""
    trained = [run for run in runs if run.adversarial is not False and run.top1]
    plain = [run for run in runs if not run.adversarial and run.top1]
    gaps = [
        (run.robust[attack] - other.robust[attack], run, other, attack)
        for run in trained
        for other in plain
        if run.name != other.name and run.network == other.network
        for attack in run.robust.keys() & other.robust.keys()
    ]
    hint = "evaluate both runs with main.py --resume=... -a, which records it in their folders"
    expect(
        bool(gaps), "no two runs of a network, plain and adversarial, have robust accuracies", hint
    )
    gap, run, other, attack = max(gaps, key=lambda found: found[0])
    expect(
        gap >= BONUS_GAP,
        f"under the {attack} attack {run.name} reaches {run.robust[attack]:.2f} %, {other.name} "
        f"{other.robust[attack]:.2f} %: expected {BONUS_GAP:g} points more",
    )


def no_probe(code: ModuleType, inputs: object) -> Findings:
    """Runs need none of the student's code."""
    return {}


def check(
    name: str, judge_it: Callable, explain: str, points: float = 1.0, bonus: bool = False
) -> Check:
    """A check of the run folders."""
    return Check("runs", points, name, no_probe, judge_it, explain, bonus=bonus)


CHECKS = (
    check(
        "SimpleNet trained",
        judge_simplenet,
        f"a run of SimpleNet reaches {SIMPLENET_TOP1:g} % top-1 within {SIMPLENET_EPOCHS} epochs "
        "(handout, part I: train SimpleNet)",
    ),
    check(
        "own convolution trained",
        judge_custom,
        f"a run on CustomConv2d reaches {CUSTOM_TOP1:g} % top-1 in {CUSTOM_EPOCHS} epochs, or "
        f"comes within {CUSTOM_GAP:g} points of a run on nn.Conv2d with as many epochs (handout, "
        "part I: train with --use-custom-conv)",
    ),
    check(
        "own network trained",
        judge_own,
        "a run of another network than SimpleNet, ResNet-18 and the ViT is above SimpleNet "
        "(handout, part I: design your own network)",
    ),
    check(
        "pre-trained network trained",
        judge_resnet,
        f"a run of ResNet-18 reaches {RESNET_TOP1:g} % top-1 (handout, part I: --use-resnet18)",
    ),
    check(
        "bonus: adversarial training",
        judge_bonus,
        f"robust accuracy is {BONUS_GAP:g} points above that of a plain run of the same network, "
        "both found by main.py -a (handout, bonus: train with --pgd)",
        points=2.0,
        bonus=True,
    ),
)


def grade(root: Path) -> list[Result]:
    """The marks of all runs below a folder such as ../logs."""
    try:
        runs, skipped = read_runs(root)
    except CheckFailed as e:
        return [Result(one, str(e), e.hint) for one in CHECKS]
    results = [judge(replace(one, inputs=lambda seed: runs), Observation()) for one in CHECKS]
    return [replace(results[0], remarks=skipped), *results[1:]]
