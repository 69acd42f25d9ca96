"""Compare SceneNet with other networks, and measure its ingredients by ablation, on the CPU.

    python benchmarks/scene_net.py DATA                    # all runs, hours; can be interrupted
    python benchmarks/scene_net.py DATA --table            # the tables of the runs so far

Each run trains by main.py on a part of DATA's training images; 100 more images per category are
held out and evaluated together with the validation images (miniplaces100 has too few:
--held-out 0). results/scene_net.json records finished runs, which are not repeated. Writes
results/scene_net.md and a figure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from results_file import RESULTS, ROOT
from scene_net_table import HALF, write_tables
from torch import Tensor, nn

import main as driver
from custom_blocks import DropPath
from custom_dataloader import MiniPlacesLoader, count_classes
from deepvision import checkpoint
from deepvision.config import OneLineParser
from deepvision.data.loader import validation_batches
from deepvision.models import registry, student
from deepvision.models.registry import create_model
from deepvision.models.scene_net import Block, SceneNet, Shape, conv_bn
from deepvision.runtime.provenance import command_line, commit
from deepvision.training import optim
from student_code import SimpleNet

RECORD = RESULTS / "scene_net.json"
WORK = ROOT / "logs" / "scene_net_benchmark"
LOGS = WORK / "runs"
OTHERS = ("SimpleNet", "SimpleNet with BatchNorm", "ResNet-18")
SHARED = ["--gpu=-1", "-j=0", "--amp=bf16", "--cache=ram", "-b=32", "--lr=0.05", "--warmup=1"]
SHARED += ["--print-freq=1000"]
# The recipe of the recorded runs
FIRST_RECIPE = ["--use-scene-net", "--cutmix=0.5"]
FIRST_RECIPE += ["--resolution=128", "--crop-area=0.25", "--rotation=15"]


# ---- Networks


@dataclass(frozen=True)
class Variant:
    """A network and its training; the defaults of `kind` apply.

    groups: makes the optimizer's parameter groups of a network.
    """

    create: Callable[[int], nn.Module]
    flags: tuple[str, ...] = ()
    kind: str = "scene_net"
    groups: Callable[[nn.Module], Iterable] = optim.weight_decay_groups


def with_batch_norm(classes: int) -> nn.Module:
    """SimpleNet with batch normalisation after each convolution."""
    net = SimpleNet(num_classes=classes)
    layers = []
    for layer in net.features:
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            layers.append(nn.BatchNorm2d(layer.out_channels))
    net.features = nn.Sequential(*layers)
    return net


def half(classes: int) -> SceneNet:
    """SceneNet of half the width."""
    return SceneNet(classes, Shape((32,), (32, 64, 128), features=512))


def without(change: Callable[[nn.Module], None]) -> Callable[[int], SceneNet]:
    """A builder of SceneNet of half the width with `change` applied to each module."""

    def create(classes: int) -> SceneNet:
        net = half(classes)
        for module in list(net.modules()):
            change(module)
        return net

    return create


def remove_se(module: nn.Module) -> None:
    """Remove a block's squeeze-and-excitation."""
    if isinstance(module, Block):
        module.excitation = nn.Identity()


def disable_drop_path(module: nn.Module) -> None:
    """Turn stochastic depth off."""
    if isinstance(module, DropPath):
        module.drop_prob = 0.0


def init_branch_at_one(module: nn.Module) -> None:
    """Undo the zero initialisation of a block's last batch normalisation."""
    if isinstance(module, Block):
        nn.init.ones_(module.branch[-1].weight)


def strided(classes: int) -> SceneNet:
    """SceneNet of half the width with strided convolutions in place of max pooling."""
    net = half(classes)
    for i, layer in enumerate(net.features):
        if isinstance(layer, nn.MaxPool2d):
            block, net.features[i] = net.features[i + 1], nn.Identity()
            if isinstance(block.shortcut, nn.Identity):  # in the first stage
                block.shortcut = nn.Sequential(*conv_bn(32, 32, kernel=1))
            block.branch[0].stride = block.shortcut[0].stride = (2, 2)
    return net


COMPARED = {
    "SimpleNet": Variant(lambda n: SimpleNet(num_classes=n), kind="torch_conv"),
    "SimpleNet with BatchNorm": Variant(with_batch_norm, kind="torch_conv"),
    "ResNet-18": Variant(lambda n: create_model("resnet18", n), kind="torch_conv"),
    HALF: Variant(half),
    "SceneNet": Variant(SceneNet),
}
ABLATIONS = {  # ingredient -> HALF without it; the names are keys of scene_net.json
    "max pooling": Variant(strided),
    "stochastic depth, label smoothing, CutMix": Variant(
        without(disable_drop_path), ("--label-smoothing=0", "--cutmix=0")
    ),
    "squeeze-and-excitation": Variant(without(remove_se)),
    "stochastic depth": Variant(without(disable_drop_path)),
    "branches that start at zero": Variant(without(init_branch_at_one)),
    "label smoothing": Variant(half, ("--label-smoothing=0",)),
    "CutMix": Variant(half, ("--cutmix=0",)),
    "norms and biases without decay": Variant(half, groups=nn.Module.parameters),
}


# ---- Runs


@dataclass(frozen=True)
class Run:
    """A training run; the fields are keys of scene_net.json.

    part: "equal epochs", "equal time" or "ablation"
    images: training images per category
    """

    part: str
    name: str
    data: str
    images: int
    epochs: int
    seed: int


def planned(args: argparse.Namespace, rows: list[dict]) -> Iterator[Run]:
    """All runs, seed by seed. The epochs of `equal time` follow from the first runs in `rows`."""
    for seed in range(args.seeds):
        common = {"data": args.data.name, "images": args.images, "seed": seed}
        for name in COMPARED:
            yield Run("equal epochs", name, epochs=args.epochs, **common)
        for name in ABLATIONS:
            yield Run("ablation", name, epochs=args.epochs, **common)
        for name, epochs in equal_time(args, rows):
            yield Run("equal time", name, epochs=epochs, **common)


def equal_time(args: argparse.Namespace, rows: list[dict]) -> Iterator[tuple[str, int]]:
    """Networks, and the epochs that take as long as HALF's, where these are not args.epochs."""
    first = {"part": "equal epochs", "data": args.data.name, "images": args.images}
    first |= {"epochs": args.epochs, "seed": 0}
    seconds = {row["name"]: row["cpu_seconds"] for row in rows if row.items() >= first.items()}
    for name in OTHERS:
        if {name, HALF} <= seconds.keys():
            epochs = max(1, round(args.epochs * seconds[HALF] / seconds[name]))
            if epochs != args.epochs:
                yield name, epochs


def prepare(data: Path, images: int, held_out: int) -> tuple[Path, Path]:
    """Make data folders for training and for evaluation; the latter's val.txt lists its images.

    `held_out` training images per category are evaluated and never trained on.
    """
    by_category: dict[str, list[str]] = {}
    for line in (data / "train.txt").read_text().splitlines():
        by_category.setdefault(line.split()[-1], []).append(line)
    held = [line for lines in by_category.values() for line in lines[:held_out]]
    trained = [line for lines in by_category.values() for line in lines[held_out:][:images]]
    val = (data / "val.txt").read_text().splitlines()
    validated = val[:: max(1, len(val) // 100)]  # by main.py after each epoch
    folders = []
    for name, val_list in (("train", validated), ("evaluate", val + held)):
        folder = WORK / f"{data.name}_{images}" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.txt").write_text("\n".join([*trained, ""]))
        (folder / "val.txt").write_text("\n".join([*val_list, ""]))
        with contextlib.suppress(FileExistsError):
            os.symlink((data / "images").resolve(), folder / "images")
        folders.append(folder)
    return tuple(folders)


def execute(run: Run, train: Path, evaluation: Path) -> dict:
    """Train by main.py in this process, evaluate the last weights; return the run's row."""
    variant = {**COMPARED, **ABLATIONS}[run.name]
    flags = [f"--epochs={run.epochs}", f"--seed={run.seed}", *SHARED]
    flags += [*(FIRST_RECIPE if variant.kind == "scene_net" else ()), *variant.flags]
    before, start = set(LOGS.glob("*")), time.process_time()
    with (
        mock.patch.dict(
            registry.MODEL_REGISTRY, {variant.kind: lambda n, shape=None: variant.create(n)}
        ),
        mock.patch.object(optim, "weight_decay_groups", variant.groups),
    ):
        if driver.main([str(train), *flags], logs=LOGS) != 0:
            raise SystemExit("this run failed; start the benchmark again to repeat it")
    seconds = time.process_time() - start
    (run_dir,) = set(LOGS.glob("*")) - before
    return {
        **asdict(run),
        "cpu_seconds": round(seconds, 1),
        **evaluate(variant, checkpoint.load(run_dir / "models" / checkpoint.LAST), evaluation),
        "command": " ".join(["python main.py", train.parent.name, *flags]),
        "commit": commit(),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
    }


def evaluate(variant: Variant, ckpt: dict, folder: Path) -> dict:
    """Top-1 hits of each image as hexadecimal bits: plain, mirror-averaged, without the EMA."""
    classes = count_classes(folder)
    images = MiniPlacesLoader(folder, None, classes, "val", student.val_transforms())
    net = variant.create(classes).eval().to(memory_format=torch.channels_last)
    net.load_state_dict(ckpt["state_dict"])
    y = torch.tensor(images.labels)
    logits, flipped = predict(net, images, flip=True)
    outputs = {"plain": logits, "mirrored": logits + flipped}
    if ckpt.get("trained") is not None:
        net.load_state_dict(ckpt["trained"])
        outputs["last weights"], _ = predict(net, images)
    top5 = (logits.topk(5).indices == y[:, None]).any(1).float().mean().item()
    hits = {name: np.packbits(output.argmax(1) == y) for name, output in outputs.items()}
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "judged": len(images),  # the key of older rows
        "top5": round(100 * top5, 2),
        "hits": {name: bits.tobytes().hex() for name, bits in hits.items()},
    }


@torch.inference_mode()
def predict(
    net: nn.Module, images: MiniPlacesLoader, flip: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits (N, K) of all images and, if `flip`, of their mirror images."""
    plain, flipped = [], []
    with torch.autocast("cpu", torch.bfloat16):
        for x, _ in validation_batches(images, workers=0):
            x = x.to(memory_format=torch.channels_last)
            plain.append(net(x).float())
            if flip:
                flipped.append(net(x.flip(3)).float())
    return torch.cat(plain), torch.cat(flipped) if flip else None


def main(argv: Sequence[str]) -> None:
    """Execute the runs that are missing and write the tables."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("data", type=Path, help="data folder in the MiniPlaces layout")
    parser.add_argument("--images", type=int, default=150, help="training images per category")
    parser.add_argument("--held-out", type=int, default=100, help="evaluated ones per category")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each run")
    parser.add_argument("--seeds", type=int, default=4, help="runs of each network")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks and ingredients")
    parser.add_argument("--table", action="store_true", help="no runs, only the tables")
    args = parser.parse_args(argv[1:])
    torch.set_num_threads(1)
    rows = json.loads(RECORD.read_text()) if RECORD.exists() else []
    folders = prepare(args.data, args.images, args.held_out)
    for run in planned(args, rows) if not args.table else ():
        done = any(row.items() >= asdict(run).items() for row in rows)
        if not done and (not args.only or run.name in args.only):
            rows.append(execute(run, *folders))
            RECORD.write_text(json.dumps(rows, indent=1) + "\n")
    write_tables(rows, command_line(argv))


if __name__ == "__main__":
    main(sys.argv)
