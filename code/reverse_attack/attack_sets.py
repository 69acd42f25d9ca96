"""Attacked test images on disk, one set per attack, norm, epsilon, steps and classifier.

<root>/pgd/<norm>/test_perturbed_{X,y}_<name>.npy and test_perturbed_<name>.meta.json, with the name
<norm>_<steps>_<attack>_eps<epsilon>_<first 8 digits of the classifier's SHA-256>. Older sets are
called <norm>_<steps>; they load as well. A set is identified by its .meta.json, not by its name.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepvision.runtime.atomic import write_atomically
from deepvision.runtime.jsonl import read_json
from utils import UserError, relpath

NORMS = {"l1": "l_1", "l2": "l_2", "linf": "l_inf"}  # names on disk and in tables
ATTACKS = {"pgd": "ce", "cw": "margin", "dlr": "dlr"}  # PGD by its loss
PREFIX, SUFFIX = "test_perturbed_", ".meta.json"
META_KEYS = {"norm", "epsilon", "iterations", "loss", "checkpoint_sha256", "images"}


@dataclass
class AttackSet:
    """x (N, 3, H, W) float32 in [0, 1], y (N,), and the record of the attack."""

    x: Tensor
    y: Tensor
    meta: dict


def name_of(meta: dict) -> str:
    """The name of the set of this record."""
    attack = next(name for name, loss in ATTACKS.items() if loss == meta["loss"])
    digits = meta["checkpoint_sha256"][:8]
    norm, steps, epsilon = meta["norm"], meta["iterations"], meta["epsilon"]
    return f"{norm}_{steps}_{attack}_eps{epsilon:g}_{digits}"


def folder_of(root: Path, norm: str) -> Path:
    """The folder of all sets of a norm."""
    return root / "pgd" / NORMS[norm]


def paths(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """The files of a set: X, y and its record."""
    x, y = (folder / f"{PREFIX}{part}_{name}.npy" for part in "Xy")
    return x, y, folder / f"{PREFIX}{name}{SUFFIX}"


def save(attacked: AttackSet, root: Path, norm: str) -> Path:
    """Write the set, in place of one of the same name; return the path of X.

    The record is written last: a set without one is incomplete.

    Raises:
        UserError: the folder is not writable.
    """
    x_path, y_path, meta_path = paths(folder_of(root, norm), name_of(attacked.meta))
    try:
        x_path.parent.mkdir(parents=True, exist_ok=True)
        meta_path.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {x_path.parent}: {e.strerror}") from None
    for path, values in ((x_path, attacked.x), (y_path, attacked.y)):
        buffer = io.BytesIO()
        np.save(buffer, values.cpu().numpy())
        write_atomically(path, buffer.getvalue())
    write_atomically(meta_path, json.dumps(attacked.meta, indent=2).encode())
    return x_path


def read_records(folder: Path) -> Iterator[tuple[str, dict]]:
    """Name and record of each set in the folder.

    Raises:
        UserError: a record is damaged.
    """
    for path in sorted(folder.glob(f"{PREFIX}*{SUFFIX}")):
        meta = read_json(path)
        if missing := META_KEYS - meta.keys():
            raise UserError(f"{path} is damaged: it has no {', '.join(sorted(missing))}")
        yield path.name[len(PREFIX) : -len(SUFFIX)], meta


def describe(meta: dict) -> str:
    """One line: which attack, on how many images, of which classifier."""
    attack = next((name for name, loss in ATTACKS.items() if loss == meta["loss"]), meta["loss"])
    unit = "/255" if meta["norm"] == "l_inf" else ""
    return (
        f"{attack}, {meta['norm']}, epsilon {meta['epsilon']:g}{unit}, {meta['iterations']} steps, "
        f"{meta['images']} images, classifier {meta['checkpoint_sha256'][:8]}"
    )


def select(
    root: Path, norm: str, steps: int | None, part: str | None, sha256: str, transfer: bool
) -> tuple[str, dict]:
    """Name and record of the only set that fits.

    steps, part: the number of steps and a part of the name; None = any.
    transfer: sets of other classifiers fit as well, where there is none of this one.

    Raises:
        UserError: no set fits, or several do.
    """
    folder = folder_of(root, norm)
    named = [
        (name, meta)
        for name, meta in read_records(folder)
        if steps in (None, meta["iterations"]) and (part or "") in name
    ]
    own = [(name, meta) for name, meta in named if meta["checkpoint_sha256"] == sha256]
    fitting = own or (named if transfer else [])
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(name for name, _ in fitting)
        raise UserError(f"{len(fitting)} attack sets fit: choose one with --set, of {names}")
    if named:
        raise UserError(
            f"the sets in {relpath(folder)} were made for another checkpoint (SHA-256 "
            f"{named[0][1]['checkpoint_sha256'][:12]}, this is {sha256[:12]}): run attack.py "
            "again, or add --transfer"
        )
    which = "".join([f" of {steps} steps" * (steps is not None), f" called {part}" * bool(part)])
    raise UserError(
        f"no attack set{which} in {relpath(folder)}: make it with reverse_attack/attack.py "
        f"--norm {NORMS[norm]} --attack-iters {5 if steps is None else steps}"
    )


def load(root: Path, norm: str, name: str, meta: dict) -> AttackSet:
    """The set of this name and record.

    Raises:
        UserError: it is damaged.
    """
    x_path, y_path, _ = paths(folder_of(root, norm), name)
    try:
        x, y = (torch.from_numpy(np.load(p, allow_pickle=False)) for p in (x_path, y_path))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"the attack set {x_path} is damaged: {e}") from None
    if x.dim() != 4 or len(x) != len(y) or len(y) == 0:
        raise UserError(f"the attack set {x_path} is damaged: {tuple(x.shape)}, {tuple(y.shape)}")
    return AttackSet(x, y, meta)
