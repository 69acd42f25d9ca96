"""Attacked test images on disk: <data-root>/pgd/<norm>/test_perturbed_{X,y}_<norm>_<iters>.npy."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepvision.checkpoint import write_atomically
from utils import UserError

NORMS = {"l_1": "l1", "l_2": "l2", "l_inf": "linf"}  # the command line's names to attacks.py's


@dataclass
class AttackSet:
    """x `(N, 3, H, W)` float32 in [0, 1], y `(N,)`, and how they were made."""

    x: Tensor
    y: Tensor
    meta: dict


def paths(root: Path, norm: str, steps: int) -> tuple[Path, Path, Path]:
    """X, y and meta of the set for a norm (l_1, l_2, l_inf) that was made with `steps` steps."""
    folder = root / "pgd" / norm
    stem = f"{norm}_{steps}"
    return (
        folder / f"test_perturbed_X_{stem}.npy",
        folder / f"test_perturbed_y_{stem}.npy",
        folder / f"test_perturbed_{stem}.meta.json",
    )


def save(made: AttackSet, root: Path, norm: str, steps: int) -> Path:
    """Write the set; its meta file comes last, so that a half-written set has none.

    Raises:
        UserError: the folder cannot be written.
    """
    to_x, to_y, to_meta = paths(root, norm, steps)
    try:
        to_x.parent.mkdir(parents=True, exist_ok=True)
        to_meta.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {to_x.parent}: {e.strerror}") from None
    for path, values in ((to_x, made.x), (to_y, made.y)):
        buffer = io.BytesIO()
        np.save(buffer, values.cpu().numpy())
        write_atomically(path, buffer.getvalue())
    write_atomically(to_meta, json.dumps(made.meta, indent=2).encode())
    return to_x


def steps_there(root: Path, norm: str) -> list[int]:
    """Numbers of steps for which there is a set, the newest first."""
    metas = (root / "pgd" / norm).glob(f"test_perturbed_{norm}_*.meta.json")
    newest = sorted(metas, key=lambda path: path.stat().st_mtime, reverse=True)
    found = (re.search(r"_(\d+)\.meta\.json$", path.name) for path in newest)
    return [int(match[1]) for match in found if match]


def load(root: Path, norm: str, steps: int | None, sha256: str, transfer: bool) -> AttackSet:
    """The set made with `steps` steps, or the newest one.

    Raises:
        UserError: it is missing, damaged, or was made for another classifier (unless `transfer`).
    """
    there = steps_there(root, norm)
    steps = steps if steps is not None else next(iter(there), None)
    if steps not in there:
        which = "no attack set" if steps is None else f"no attack set of {steps} iterations"
        have = f"; there are those of {there}" if there else ""
        raise UserError(
            f"{which} for {norm} in {root / 'pgd'}{have}: make it with "
            f"reverse_attack/attack.py --norm {norm} --attack_iters {steps or 5}"
        )
    from_x, from_y, from_meta = paths(root, norm, steps)
    try:
        meta = json.loads(from_meta.read_text())
        x, y = (torch.from_numpy(np.load(p, allow_pickle=False)) for p in (from_x, from_y))
        made_for = meta["checkpoint_sha256"]
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"the attack set {from_x} is damaged: {e}") from None
    if x.dim() != 4 or len(x) != len(y) or len(y) == 0:
        raise UserError(f"the attack set {from_x} is damaged: {tuple(x.shape)}, {tuple(y.shape)}")
    if made_for != sha256 and not transfer:
        raise UserError(
            f"{from_x} was made for another checkpoint (SHA-256 {made_for[:12]}, this is "
            f"{sha256[:12]}): run attack.py again, or add --transfer"
        )
    return AttackSet(x, y, meta)
