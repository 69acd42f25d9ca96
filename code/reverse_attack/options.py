"""Command lines of Part IV: common flags, presets, and the execution of a command."""

from __future__ import annotations

import argparse
import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from deepvision.config import DEVICE_HELP, OneLineParser, at_least, device_id
from deepvision.runtime.device import choose_device, configure_backend
from deepvision.runtime.errors import exit_code
from deepvision.runtime.provenance import command_line, provenance, strip_folder
from reverse_attack import resnets
from reverse_attack.data import DATASETS, download_cifar10
from reverse_attack.reversal import BUDGETS
from utils import UserError

# Choices of Mao et al. (2021) that differ from the defaults here; each command takes those it has
PRESETS = {
    "paper": {
        "budgets": BUDGETS | {"l2": 256 / 255},
        "min_crop": 0.08,
        "negatives": "batch",
        "random_start": True,
    }
}

# The published scripts count l_2 and l_1 in 1/255 too; on CIFAR-10, such a large epsilon is theirs
PUBLISHED_UNITS = {"l2": 32.0, "l1": 255.0}


def make_parser(description: str, batch_size: int | None) -> OneLineParser:
    """A parser with the flags that every command takes."""
    parser = OneLineParser(description=description)
    parser.set_defaults(budgets=BUDGETS)
    add = parser.add_argument
    add("--data-root", type=Path, default="../data", help="holds cifar10/, or MiniPlaces itself")
    add("--dataset", choices=DATASETS, default="cifar10", help="kind of data in the data root")
    add("--download", action="store_true", help="download CIFAR-10 with torchvision")
    add("--arch", type=arch, default="narrow", help=f"{', '.join(resnets.ARCHS)} or wrn-D-W")
    add("--weights", metavar="FILE", help="checkpoint of the classifier; default: the newest run's")
    add("--device", "--gpu", type=device_id, metavar="N", help=DEVICE_HELP)
    add("--bf16", action="store_true", help="networks compute in bfloat16: faster, less precise")
    add("--seed", type=at_least(int, 0, 2**31), default=0, help="of weights, images, attacks")
    add(
        "--limit", type=at_least(int, 1), metavar="N", help="the first N images of the seed's order"
    )
    add(
        "-b",
        "--batch-size",
        "--batchsize",
        type=at_least(int, 1),
        default=batch_size,
        metavar="N",
        help="images per step",
    )
    add("--preset", choices=PRESETS, help="paper = the choices of Mao et al., 2021")
    return parser


def add_view_flags(parser: argparse.ArgumentParser, n_views: int | None = 4) -> None:
    """Flags for the random views of the contrastive loss."""
    if n_views:
        parser.add_argument(
            "--n-views", type=at_least(int, 2), default=n_views, help="random views per image"
        )
    parser.add_argument(
        "--min-crop",
        type=at_least(float, 0.01, 1),
        metavar="AREA",
        help="smallest area of a crop; default 0.2 in training, then as the head was trained",
    )


def add_reversal_flags(parser: argparse.ArgumentParser, negatives: str) -> None:
    """Flags for the reversal's negatives and starting point."""
    add = parser.add_argument
    add("--head", metavar="FILE", help="default: the newest head of this classifier")
    add(
        "--negatives",
        choices=("batch", "bank"),
        default=negatives,
        help=f"the other images of the batch, or a fixed bank; default {negatives}",
    )
    add(
        "--random-start",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="start at random within the reversal's ball, not at the image",
    )


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    script: str,
    presets: dict[str, dict] | None = None,
) -> Namespace:
    """Read the words after the script's name; flags that are given override the preset.

    presets: values that this script adds to `PRESETS`.
    The namespace also holds `command`, the command line for records.
    """
    args = parser.parse_args(argv)
    if args.preset:
        values = PRESETS[args.preset] | (presets or {}).get(args.preset, {})
        parser.set_defaults(**{k: v for k, v in values.items() if hasattr(args, k)})
        args = parser.parse_args(argv)
    args.command = command_line([f"reverse_attack/{script}", *argv])
    return args


def arch(text: str) -> str:
    """An argparse type: the name of a network of `resnets`."""
    try:
        with torch.device("meta"):
            resnets.build(text, 10)
    except ValueError as e:
        raise ArgumentTypeError(str(e)) from None
    return text


def norm(*others: str) -> Callable[[str], str]:
    """An argparse type: linf, l2 or l1, also with an underscore, or one of `others`."""

    def name(text: str) -> str:
        found = text.replace("_", "")
        if found not in (*BUDGETS, *others):
            known = ", ".join((*BUDGETS, *others))
            raise ArgumentTypeError(f"{text!r} is not one of {known}")
        return found

    return name


def check_epsilon(epsilon: float | None, norm: str, dataset: str) -> None:
    """Refuse an epsilon that is 0, too large, or in the unit of the published scripts.

    Raises:
        UserError: it is one of these.
    """
    if epsilon is None:
        return
    if epsilon == 0:
        raise UserError("--epsilon 0 leaves every image as it is: use a positive epsilon")
    if norm == "linf" and epsilon > 255:
        raise UserError(f"--epsilon {epsilon:g}: l_inf counts in 1/255, so 255 is the whole box")
    if dataset == "cifar10" and epsilon >= PUBLISHED_UNITS.get(norm, float("inf")):
        raise UserError(
            f"--epsilon {epsilon:g}: {norm} counts on images in [0, 1] here, in 1/255 in the "
            f"paper's published scripts: their {epsilon:g} is --epsilon {epsilon / 255:.6g}"
        )


def require_writable(folder: Path) -> Path:
    """Make the folder if it is missing; called before the work whose results go there.

    Raises:
        UserError: it is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}: no permission")
    return folder


def record(args: Namespace) -> dict:
    """Where a result comes from, for config.json and result files; without absolute paths."""
    plain = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str | None)}
    arguments = {k: strip_folder(v) if isinstance(v, str) else v for k, v in plain.items()}
    return provenance(args.device, args.command) | {"arguments": arguments}


def run(command: Callable[[Namespace], None], args: Namespace, logs: Path) -> int:
    """Run a command and return the exit code; a user's mistake is one line on standard error.

    `args` gets `logs`, the folder of the run folders, and the `torch.device` in place of its name.
    """
    try:
        args.device = choose_device(args.device)
        configure_backend(args.device)
        args.logs = logs
        if args.download and args.dataset == "cifar10":
            download_cifar10(args.data_root)
        torch.manual_seed(args.seed)
        command(args)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as e:
        return exit_code(e)
    return 0
