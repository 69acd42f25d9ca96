"""SceneNet beside other networks, and SceneNet without one of its ingredients, on the CPU:

    python benchmarks/scene_net.py DATA                    # all runs, hours; stop it as you like
    python benchmarks/scene_net.py DATA --table            # the tables of what has been run

Each run is main.py's, on a part of DATA's training images; 100 more of each category are held out
and judged together with the validation images (miniplaces100 has none to spare: --held-out 0).
Finished runs are kept in results/scene_net.json, and only the others are made;
results/scene_net.{md,png} tell what they are worth.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))

from scene_net_table import HALF, write_tables  # noqa: E402

import main  # noqa: E402
from custom_blocks import DropPath  # noqa: E402
from custom_dataloader import MiniPlacesLoader, count_classes  # noqa: E402
from deepvision import checkpoint  # noqa: E402
from deepvision.data.loader import validation_batches  # noqa: E402
from deepvision.models import registry  # noqa: E402
from deepvision.models.scene_net import Block, SceneNet, conv_bn  # noqa: E402
from deepvision.runtime import run_logger  # noqa: E402
from deepvision.training import optim  # noqa: E402
from student_code import SimpleNet, get_val_transforms  # noqa: E402

RECORD = ROOT / "results" / "scene_net.json"
WORK = ROOT / "logs" / "scene_net_benchmark"
OTHERS = ("SimpleNet", "SimpleNet with BatchNorm", "ResNet-18")
SHARED = ["--gpu=-1", "-j=0", "--amp=bf16", "--cache=ram", "-b=32", "--lr=0.05", "--warmup=1"]
SHARED += ["--print-freq=1000"]


# ---- Networks


@dataclass(frozen=True)
class Variant:
    """A network and how it is trained; `kind` decides whose recipe it follows."""

    build: Callable[[int], nn.Module]
    flags: tuple[str, ...] = ()
    kind: str = "scene_net"
    groups: Callable[[nn.Module], Iterable] = optim.weight_decay_groups


def with_batch_norm(classes: int) -> nn.Module:
    net = SimpleNet(num_classes=classes)
    layers = []
    for layer in net.features:
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            layers.append(nn.BatchNorm2d(layer.out_channels))
    net.features = nn.Sequential(*layers)
    return net


def resnet18(classes: int) -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=classes)


def half(classes: int) -> SceneNet:
    return SceneNet(classes, width=32)


def without(change: Callable[[nn.Module], None]) -> Callable[[int], SceneNet]:
    """SceneNet of half the width, each of its modules changed."""

    def build(classes: int) -> SceneNet:
        net = half(classes)
        for module in list(net.modules()):
            change(module)
        return net

    return build


def no_excitation(module: nn.Module) -> None:
    if isinstance(module, Block):
        module.excitation = nn.Identity()


def no_drop_path(module: nn.Module) -> None:
    if isinstance(module, DropPath):
        module.drop_prob = 0.0


def no_zero_start(module: nn.Module) -> None:
    if isinstance(module, Block):
        nn.init.ones_(module.branch[-1].weight)


def strided(classes: int) -> SceneNet:
    """Each pooling left out, and a step of 2 in the convolutions behind it."""
    net = half(classes)
    for i, layer in enumerate(net.features):
        if isinstance(layer, nn.MaxPool2d):
            block, net.features[i] = net.features[i + 1], nn.Identity()
            if isinstance(block.shortcut, nn.Identity):  # the first stage's
                block.shortcut = nn.Sequential(*conv_bn(32, 32, kernel=1))
            block.branch[0].stride = block.shortcut[0].stride = (2, 2)
    return net


COMPARED = {
    "SimpleNet": Variant(lambda n: SimpleNet(num_classes=n), kind="torch_conv"),
    "SimpleNet with BatchNorm": Variant(with_batch_norm, kind="torch_conv"),
    "ResNet-18": Variant(resnet18, kind="torch_conv"),
    HALF: Variant(half),
    "SceneNet": Variant(SceneNet),
}
ABLATIONS = {  # what HALF is to do without
    "max pooling": Variant(strided),
    "stochastic depth, label smoothing, CutMix": Variant(
        without(no_drop_path), ("--label-smoothing=0", "--cutmix=0")
    ),
    "squeeze-and-excitation": Variant(without(no_excitation)),
    "stochastic depth": Variant(without(no_drop_path)),
    "branches that start at zero": Variant(without(no_zero_start)),
    "label smoothing": Variant(half, ("--label-smoothing=0",)),
    "CutMix": Variant(half, ("--cutmix=0",)),
    "norms and biases without decay": Variant(half, groups=nn.Module.parameters),
}


# ---- Runs


@dataclass(frozen=True)
class Run:
    part: str  # "equal epochs", "equal time" or "ablation"
    name: str
    data: str
    images: int
    epochs: int
    seed: int


def planned(args: argparse.Namespace, rows: list[dict]) -> Iterator[Run]:
    """All runs, the most telling first; `equal time` follows from what the first ones took."""

    for seed in range(args.seeds):

        def run(part: str, name: str, epochs: int = args.epochs, seed: int = seed) -> Run:
            return Run(part, name, args.data.name, args.images, epochs, seed)

        yield from (run("equal epochs", name) for name in COMPARED)
        yield from (run("ablation", name) for name in ABLATIONS)
        like = asdict(run("equal epochs", "", seed=0)).items() - {("name", "")}
        cost = {r["name"]: r["cpu_seconds"] for r in rows if r.items() >= like}
        for name in OTHERS:
            if {name, HALF} <= cost.keys():
                epochs = max(1, round(args.epochs * cost[HALF] / cost[name]))
                if epochs != args.epochs:  # else its run at equal epochs is that in equal time, too
                    yield run("equal time", name, epochs)


def prepare(data: Path, images: int, held_out: int) -> tuple[Path, Path]:
    """Folders in the MiniPlaces layout: one to train on, one whose val.txt is to be judged.

    `held_out` training images of each category are judged, too, and never trained on.
    """
    of_category: dict[str, list[str]] = {}
    for line in (data / "train.txt").read_text().splitlines():
        of_category.setdefault(line.split()[-1], []).append(line)
    spared = [line for lines in of_category.values() for line in lines[:held_out]]
    trained = [line for lines in of_category.values() for line in lines[held_out:][:images]]
    val = (data / "val.txt").read_text().splitlines()
    seen = val[:: max(1, len(val) // 100)]  # by main.py after each epoch
    folders = []
    for name, val_list in (("train", seen), ("judge", val + spared)):
        folder = WORK / f"{data.name}_{images}" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.txt").write_text("\n".join([*trained, ""]))
        (folder / "val.txt").write_text("\n".join([*val_list, ""]))
        with contextlib.suppress(FileExistsError):
            os.symlink((data / "images").resolve(), folder / "images")
        folders.append(folder)
    return tuple(folders)


def carry_out(run: Run, train: Path, judge: Path) -> dict:
    """Train by main.py in this process, judge the last weights, tell both."""
    variant = {**COMPARED, **ABLATIONS}[run.name]
    flags = [f"--epochs={run.epochs}", f"--seed={run.seed}", *SHARED, *variant.flags]
    flags += ["--use-scene-net"] if variant.kind == "scene_net" else []
    run_logger.LOGS = WORK / "runs"
    before, start = set(run_logger.LOGS.glob("*")), time.process_time()
    with (
        mock.patch.dict(registry.MODEL_REGISTRY, {variant.kind: variant.build}),
        mock.patch.object(optim, "decayed_and_not", variant.groups),
    ):
        if main.main([str(train), *flags]) != 0:
            raise SystemExit("this run failed; started again, the benchmark goes on with it")
    seconds = time.process_time() - start
    (folder,) = set(run_logger.LOGS.glob("*")) - before
    return {
        **asdict(run),
        "cpu_seconds": round(seconds, 1),
        **judged(variant, checkpoint.load(folder / "models" / checkpoint.LAST), judge),
        "command": " ".join(["python main.py", train.parent.name, *flags]),
        "commit": run_logger.commit(),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
    }


def judged(variant: Variant, content: dict, folder: Path) -> dict:
    """Top-1 hits image by image (hexadecimal): plain, mirrored, and without the mean of weights."""
    classes = count_classes(folder)
    images = MiniPlacesLoader(folder, None, classes, "val", get_val_transforms())
    net = variant.build(classes).eval().to(memory_format=torch.channels_last)
    net.load_state_dict(content["state_dict"])
    y = torch.tensor(images.labels)
    logits, mirrored = logits_of(net, images, both=True)
    answers = {"plain": logits, "mirrored": logits + mirrored}
    if content.get("trained") is not None:
        net.load_state_dict(content["trained"])
        answers["last weights"], _ = logits_of(net, images)
    top5 = (logits.topk(5).indices == y[:, None]).any(1).float().mean().item()
    hits = {name: np.packbits(found.argmax(1) == y) for name, found in answers.items()}
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "judged": len(images),
        "top5": round(100 * top5, 2),
        "hits": {name: bits.tobytes().hex() for name, bits in hits.items()},
    }


@torch.inference_mode()
def logits_of(
    net: nn.Module, images: MiniPlacesLoader, both: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits (N, K) of all images and, if asked for, of their mirror images."""
    found: tuple[list, list] = ([], [])
    with torch.autocast("cpu", torch.bfloat16):
        for x, _ in validation_batches(images, workers=0):
            x = x.to(memory_format=torch.channels_last)
            found[0].append(net(x).float())
            if both:
                found[1].append(net(x.flip(3)).float())
    return torch.cat(found[0]), torch.cat(found[1]) if both else None


def command() -> None:
    parser = argparse.ArgumentParser(description="Compare SceneNet, and take it apart.")
    parser.add_argument("data", type=Path, help="data folder in the MiniPlaces layout")
    parser.add_argument("--images", type=int, default=150, help="of each category, to train on")
    parser.add_argument("--held-out", type=int, default=100, help="of each, judged as well")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks and ingredients")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(RECORD.read_text()) if RECORD.exists() else []
    folders = prepare(args.data, args.images, args.held_out)
    for run in planned(args, rows) if not args.table else ():
        known = any(row.items() >= asdict(run).items() for row in rows)
        if not known and (not args.only or run.name in args.only):
            rows.append(carry_out(run, *folders))
            RECORD.write_text(json.dumps(rows, indent=1) + "\n")
    write_tables(rows)


if __name__ == "__main__":
    command()
