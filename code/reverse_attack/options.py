"""What the commands of Part IV share: flags, the device, one line for a mistake."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from deepvision.checkpoint import write_atomically
from deepvision.config import OneLineParser, at_least
from deepvision.runtime import run_logger
from deepvision.training.engine import device_name
from reverse_attack import resnets
from reverse_attack.data import DATASETS, download_cifar10
from utils import UserError


def parser(description: str, batchsize: int) -> OneLineParser:
    """The flags that every command takes."""
    made = OneLineParser(description=description)
    add = made.add_argument
    add("--data-root", type=Path, default="../data", help="holds cifar10/, or MiniPlaces itself")
    add("--dataset", choices=DATASETS, default="cifar10")
    add("--download", action="store_true", help="CIFAR-10, by torchvision's downloader")
    add("--arch", type=arch, default="narrow", help=f"{', '.join(resnets.ARCHS)} or wrn-D-W")
    add("--weights", metavar="FILE", help="the classifier, instead of the newest trained one")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--bf16", action="store_true", help="networks compute in bfloat16: faster, less exact")
    add("--seed", type=at_least(int, 0, 2**31), default=0)
    add("--limit", type=at_least(int, 1), metavar="N", help="only the first N shuffled images")
    add("--batchsize", "--batch_size", type=at_least(int, 1), default=batchsize)
    return made


def arch(text: str) -> str:
    try:
        with torch.device("meta"):
            resnets.build(text, 10)
    except ValueError as e:
        raise ArgumentTypeError(str(e)) from None
    return text


def choose_device(name: str) -> torch.device:
    """
    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: it is auto, cpu, cuda, cuda:1 or mps")
    device = torch.device(name)
    there = {
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
        "cuda": (device.index or 0) < torch.cuda.device_count(),
    }
    if not there[device.type]:
        raise UserError(f"--device {name}: PyTorch finds no such device here")
    return device


def writable(folder: Path) -> Path:
    """The folder, made if need be: asked for before the work whose results go there.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}: no permission")
    return folder


def provenance(args: Namespace, device: torch.device) -> dict:
    """How a result came about; paths of this machine are left out."""
    kept = {k: bare(v) for k, v in vars(args).items() if isinstance(v, int | float | str | None)}
    script = Path(sys.argv[0]).name
    words = ("=".join(map(bare, word.split("="))) for word in sys.argv[1:])
    return {
        "command": shlex.join(["python", f"reverse_attack/{script}", *words]),
        "arguments": kept,
        "commit": run_logger.commit(),
        "device": device_name(device),
        "torch": torch.__version__,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
    }


def bare(value: object) -> object:
    """Of an absolute path its last part; anything else as it is."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def write_config(folder: Path, args: Namespace, device: torch.device) -> None:
    """Beside a run's checkpoints: how it was started."""
    content = json.dumps(provenance(args, device), indent=2)
    write_atomically(folder / "config.json", content.encode())


def run(command: Callable[[Namespace], None], args: Namespace) -> int:
    """Run a command; a mistake of the user's is one line, and 1 its exit status."""
    try:
        if args.download and args.dataset == "cifar10":
            download_cifar10(args.data_root)
        torch.manual_seed(args.seed)
        command(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is too small: use a smaller --batchsize", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; what was written is whole.", file=sys.stderr)
        return 130
    return 0
