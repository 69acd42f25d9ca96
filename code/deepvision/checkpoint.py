"""Checkpoint files: written atomically, read as data only, checked before anything is restored.

Files are only read with `weights_only=True`, so that a stranger's file cannot run code.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deepvision.runtime.atomic import write_atomically
from deepvision.runtime.provenance import ROOT
from utils import UserError, relpath

SMALLEST_PICKLE = 16  # bytes; anything shorter was cut off
WEIGHTS = ROOT / "results" / "weights"  # networks for anyone to load
LAST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
PREVIOUS = "checkpoint_previous.pth.tar"

# The state that each optimizer keeps of a parameter
OPTIMIZER_STATE_KEYS = {
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}

# Errors that restoring a damaged or hostile part can raise
INVALID = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, OverflowError)


def save(path: Path, ckpt: dict, previous: Path | None = None) -> None:
    """Write a checkpoint; see `write_atomically`."""
    buffer = io.BytesIO()
    torch.save(ckpt, buffer)
    write_atomically(path, buffer.getvalue(), previous)


def load(path: str | Path) -> dict:
    """Read a checkpoint on the CPU; `state_dict` comes without wrappers' prefixes.

    Raises:
        UserError: the file is missing, damaged, no checkpoint, or would run code. Where the same
            run has a valid one, the message names it.
    """
    path = Path(path)
    try:
        return _read(path)
    except UserError as e:
        others = (LAST, PREVIOUS) if path.name in (LAST, PREVIOUS, BEST) else ()
        if good := latest_valid(path.parent, others):
            raise UserError(f"{e}; this one is valid: --resume={good}") from None
        raise


def locate(path: str, name: str = LAST) -> Path:
    """The checkpoint that `path` means: a file, or a run folder's file `name`; ~ is expanded."""
    found = Path(path).expanduser()
    return found / "models" / name if found.is_dir() else found


def locate_weights(name: str) -> Path | str:
    """The file of results/weights that has this name, else `name` itself, with ~ expanded."""
    known = WEIGHTS / f"{name}.pth.tar"
    return relpath(known) if name.isidentifier() and known.is_file() else Path(name).expanduser()


def latest_valid(folder: Path, names: Iterable[str] = (LAST, PREVIOUS)) -> Path | None:
    """The first of these files that loads."""
    for path in (folder / name for name in names):
        with contextlib.suppress(UserError):
            _read(path)
            return path
    return None


def _read(path: Path) -> dict:
    if not os.path.isfile(path):  # False as well where permission is denied
        raise UserError(f"no checkpoint at {path}")
    try:
        if what := _foreign_file(path):
            raise UserError(f"{path} is no checkpoint: it is {what}")
        _check_sums(path)
        with torch.serialization.safe_globals(_numpy_scalars()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which the checks here cover
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        name = re.search(r"GLOBAL ([\w.]+)", str(e))
        if not name and os.path.getsize(path) < SMALLEST_PICKLE:
            raise UserError(f"{path} is damaged or no checkpoint: it is cut off") from None
        why = f"it asks for {name[1]}" if name else "it holds more than tensors and plain values"
        raise UserError(f"refused to load {path}: {why}, which could run code") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except UserError:
        raise
    except Exception as e:  # a damaged or foreign file can fail at any point of the reading
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{path} is damaged or no checkpoint: {reason}") from None
    if not isinstance(ckpt, dict) or not _is_state_dict(ckpt.get("state_dict")):
        raise UserError(f"{path} is no checkpoint of this project: it has no 'state_dict'")
    ckpt["state_dict"] = {
        re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in ckpt["state_dict"].items()
    }
    return ckpt


def _foreign_file(path: Path) -> str | None:
    """What a file is that people take for a checkpoint, and what to do; None for any other."""
    with open(path, "rb") as file:
        head = file.read(512)
    start = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file itself with: git lfs pull"
    if start.startswith((b"<!doctype", b"<html")):
        return "a web page; download the file again, logged in or by its direct link"
    if head.startswith(b"\x1f\x8b"):
        return "gzip-compressed; unpack it first"
    if head.startswith((b"{", b"[")):
        return "a JSON file, such as a run's config.json; name the file in models/"
    if not head:
        return "empty"
    return "filled with zeros: its download was interrupted" if not any(head) else None


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()
    )


def _check_sums(path: Path) -> None:
    """Check the CRC-32 of every record; torch itself does not check them all."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad:
            raise ValueError(f"the checksum of its record {bad} is wrong")


def _numpy_scalars() -> list:
    """The globals of a best accuracy saved as a numpy number, under numpy 1's and 2's names."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(t)) for t in (np.float32, np.float64, np.int64)]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def state_dict_mismatch(model: nn.Module, state_dict: dict[str, Tensor]) -> list[str]:
    """The differences between these weights and the network's; empty where they fit."""
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    theirs = {k: tuple(v.shape) for k, v in state_dict.items()}
    return (
        [f"{k} is missing" for k in own if k not in theirs]
        + [f"{k} is not part of the network" for k in theirs if k not in own]
        + [
            f"{k} is {theirs[k]} in the file and {own[k]} in the network"
            for k in own
            if k in theirs and own[k] != theirs[k]
        ]
    )


def load_weights(model: nn.Module, ckpt: dict, path: str | Path, part: str = "state_dict") -> None:
    """Load a checkpoint's weights into `model`, which stays untouched if they do not fit.

    part: `state_dict`, or `trained`: the weights under training where `state_dict` is their EMA.

    Raises:
        UserError: keys or shapes differ, or a weight is not finite.
    """
    state_dict = ckpt[part]
    if not _is_state_dict(state_dict):
        raise UserError(f"{path}: its part '{part}' is invalid")
    if wrong := state_dict_mismatch(model, state_dict):
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"{path} does not fit the network: {'; '.join(wrong[:3])}{more}")
    if bad := first_nonfinite({"state_dict": state_dict}):
        raise UserError(f"{path} holds weights that are not finite (nan or inf), in {bad}")
    model.load_state_dict(state_dict)


def load_optimizer(optimizer: torch.optim.Optimizer, ckpt: dict) -> str | None:
    """Restore momentum and moments; learning rates stay those of the settings.

    Returns the reason where that is not possible, else None.
    """
    saved = ckpt.get("optimizer")
    if saved is None or isinstance(saved, dict) and not saved:
        return "the file has no optimizer state: momentum starts at zero"
    try:
        matches = _matches(optimizer, saved)
    except INVALID:
        matches = False
    if not matches:
        return "the file's optimizer state is another optimizer's: momentum starts at zero"
    own = optimizer.state_dict()
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own["param_groups"]})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value is not None and value.shape == parameter.shape:
                # in the parameter's memory layout, which fused steps on GPUs require
                state[name] = torch.empty_like(parameter).copy_(value)
    return None


def _matches(optimizer: torch.optim.Optimizer, saved: dict) -> bool:
    """Whether a state dict is of this kind of optimizer, for parameters of these shapes."""
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        return False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return all(
        state.keys() == OPTIMIZER_STATE_KEYS[type(optimizer)]
        and all(_fits(value, parameters[i]) for value in state.values())
        for i, state in saved["state"].items()
    )


def _fits(value: object, parameter: Tensor) -> bool:
    if value is None:  # SGD's momentum with --momentum=0
        return True
    return value.shape in (parameter.shape, ()) and bool(value.isfinite().all())


@contextlib.contextmanager
def validated(part: str) -> Iterator[None]:
    """Turn the errors of restoring an invalid part of a checkpoint into one line.

    Raises:
        UserError: names the part.
    """
    try:
        yield
    except INVALID:
        raise UserError(f"the checkpoint's {part} is invalid") from None


def load_scaler(scaler: torch.amp.GradScaler, ckpt: dict) -> None:
    """Restore the loss scale of float16, where the run had one.

    Raises:
        UserError: it is invalid.
    """
    saved = ckpt.get("scaler")
    if not scaler.is_enabled() or saved is None or isinstance(saved, dict) and not saved:
        return
    with validated("scaler"):
        scale, growth = float(saved["scale"]), int(saved["_growth_tracker"])
        if not (0 < scale < math.inf and 0 <= growth < 2**31):
            raise ValueError
    scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": growth})


def skipped_images(ckpt: dict) -> list[str] | None:
    """The images that the run leaves out; None where the file does not say.

    Raises:
        UserError: the list is invalid.
    """
    names = ckpt.get("left_out")
    with validated("left_out"):
        if names is not None and not (isinstance(names, list) and {str} >= set(map(type, names))):
            raise ValueError
    return names


def first_nonfinite(ckpt: dict) -> str | None:
    """The name of the first weight or moment that holds nan or inf; None if all are finite."""
    moments = ckpt.get("optimizer", {}).get("state", {})
    tensors = {f"moment {k} of {i}": v for i, s in moments.items() for k, v in s.items()}
    tensors |= ckpt["state_dict"]
    bad = (k for k, v in tensors.items() if isinstance(v, Tensor) and not v.isfinite().all())
    return next(bad, None)
