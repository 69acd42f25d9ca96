"""Everything a run saves and restores.

A file appears whole or not at all: it is written beside its place, synced, and renamed.
Files are only ever read with `weights_only=True`, so that a stranger's cannot run code.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deepvision.runtime import distributed
from deepvision.training.objectives import CatastrophicOverfittingGuard
from utils import UserError

LAST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
PREVIOUS = "checkpoint_previous.pth.tar"

# What each optimizer remembers of a parameter
OPTIMIZER_STATE_KEYS = {
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # epochs done
    position: int = 0  # batches done of the epoch under way
    best_acc1: float = float("-inf")
    best_robust: float = float("-inf")
    tally: list[float] = field(default_factory=list)  # sums over the epoch under way
    seconds: float = 0.0  # spent on it
    order: dict = field(default_factory=dict)  # what the order of its batches follows from


def write_atomically(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Replace `path` by `data`; whatever happens, the old or the new content is there, whole.

    Of several processes, rank 0 writes.
    The old content is kept as `previous`, once the new one is in place: it may be a damaged file,
    and what `previous` held the only good one.

    Raises:
        UserError: the disk is full, or the folder is missing or not writable.
    """
    if not distributed.is_main_process():
        return
    partial = path.with_name(path.name + ".part")
    spare = path.with_name(path.name + ".old")
    try:
        with open(partial, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if keep := previous is not None and path.exists():
            _link(path, spare)
        os.replace(partial, path)
        if keep:
            os.replace(spare, previous)
        _sync_folder(path.parent)
    except OSError as e:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
            spare.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {e.strerror}; what was there is intact") from None


def _link(path: Path, spare: Path) -> None:
    spare.unlink(missing_ok=True)  # of a run that was killed
    try:
        os.link(path, spare)
    except OSError:  # a file system without links
        shutil.copyfile(path, spare)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and needs no sync of it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: Path, content: dict, previous: Path | None = None) -> None:
    """Write a checkpoint; see `write_atomically`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue(), previous)


def load(path: str | Path) -> dict:
    """Read a checkpoint on the CPU; `state_dict` comes without wrappers' prefixes.

    Raises:
        UserError: the file is missing, damaged, no checkpoint, or would run code. Where the same
            run has a good one, the message names it.
    """
    path = Path(path)
    try:
        return _read(path)
    except UserError as e:
        others = (LAST, PREVIOUS) if path.name in (LAST, PREVIOUS, BEST) else ()
        if good := latest_valid(path.parent, others):
            raise UserError(f"{e}; this one is good: --resume={good}") from None
        raise


def latest_valid(folder: Path, names: Iterable[str] = (LAST, PREVIOUS)) -> Path | None:
    """The first of these files that loads."""
    for path in (folder / name for name in names):
        with contextlib.suppress(UserError):
            _read(path)
            return path
    return None


def _read(path: Path) -> dict:
    if not os.path.isfile(path):  # False, too, for what one may not look at
        raise UserError(f"no checkpoint at {path}")
    try:
        _check_sums(path)
        with torch.serialization.safe_globals(_numpy_scalars()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles, which the checks here judge
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        name = re.search(r"GLOBAL ([\w.]+)", str(e))
        why = f"it asks for {name[1]}" if name else "it holds more than tensors and plain values"
        raise UserError(f"refused to load {path}: {why}, which could run code") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except Exception as e:  # a damaged or foreign file can fail at any point of the reading
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{path} is damaged or no checkpoint: {reason}") from None
    if not isinstance(content, dict) or not _is_state_dict(content.get("state_dict")):
        raise UserError(f"{path} is no checkpoint of this project: it has no 'state_dict'")
    content["state_dict"] = {
        re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in content["state_dict"].items()
    }
    return content


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()
    )


def _check_sums(path: Path) -> None:
    """Every record of a checkpoint carries a CRC-32; torch itself does not look at all of them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad:
            raise ValueError(f"the checksum of its part {bad} is wrong")


def _numpy_scalars() -> list:
    """What a best accuracy saved as a numpy number needs, under numpy 1's and 2's names."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(t)) for t in (np.float32, np.float64, np.int64)]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def state_dict_mismatch(model: nn.Module, state_dict: dict[str, Tensor]) -> list[str]:
    """Why these weights do not fit this network; empty where they do."""
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


def load_weights(
    model: nn.Module, content: dict, path: str | Path, part: str = "state_dict"
) -> None:
    """Put a checkpoint's weights into `model`, which stays untouched if they do not fit.

    part: `state_dict`, or `trained` where that is the mean of the weights under training.

    Raises:
        UserError: keys or shapes differ, or a weight is not finite.
    """
    state_dict = content[part]
    if not _is_state_dict(state_dict):
        raise UserError(f"{path}: its part '{part}' makes no sense")
    if wrong := state_dict_mismatch(model, state_dict):
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"{path} does not fit the network: {'; '.join(wrong[:3])}{more}")
    if bad := first_nonfinite({"state_dict": state_dict}):
        raise UserError(f"{path} holds weights that are not finite (nan or inf), in {bad}")
    model.load_state_dict(state_dict)


def load_optimizer(optimizer: torch.optim.Optimizer, content: dict) -> str | None:
    """Restore the optimizer's memory (momentum, moments); rates stay those of the command line.

    Returns what could not be restored, in words, or None.
    """
    saved = content.get("optimizer")
    if saved is None or isinstance(saved, dict) and not saved:
        return "the file has no optimizer state: momentum starts at zero"
    if not _is_of(optimizer, saved):
        return "the file's optimizer state is another optimizer's: momentum starts at zero"
    own = optimizer.state_dict()
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own["param_groups"]})
    for parameter, memory in optimizer.state.items():
        for name, value in memory.items():
            if value is not None and value.shape == parameter.shape:
                # in its layout: the fused steps of GPUs refuse another
                memory[name] = torch.empty_like(parameter).copy_(value)
    return None


def _is_of(optimizer: torch.optim.Optimizer, saved: object) -> bool:
    """Whether a state dict is of this kind of optimizer, and of parameters of these shapes."""
    try:
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        memories = list(saved["state"].items())
        if sizes != [len(group["params"]) for group in optimizer.param_groups]:
            return False
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return all(
            memory.keys() == OPTIMIZER_STATE_KEYS[type(optimizer)]
            and all(_fits(value, parameters[i]) for value in memory.values())
            for i, memory in memories
        )
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):
        return False


def _fits(value: object, parameter: Tensor) -> bool:
    if value is None:  # SGD's momentum with --momentum=0
        return True
    return value.shape in (parameter.shape, ()) and bool(value.isfinite().all())


def load_progress(content: dict, order: dict) -> tuple[Progress, str | None]:
    """How far the run had come, and what of it cannot be restored, in words.

    order: what the order of this run's batches follows from, by name. An epoch that was under way
        in another order starts over.

    Raises:
        UserError: the content makes no sense.
    """
    try:
        best = float(content.get("best_acc1", float("-inf")))
        robust = float(content.get("best_robust", float("-inf")))
        progress = Progress(int(content.get("epoch", 0)), 0, best, robust, order=order)
        middle = content.get("progress") or {"position": 0, "tally": [], "order": {}}
        if not isinstance(middle, dict):
            raise TypeError
        position, tally = int(middle["position"]), [float(v) for v in middle["tally"]]
        seconds = float(middle.get("seconds", 0))
        changed = [name for name in order if middle["order"].get(name) != order[name]]
        if (
            progress.epoch < 0
            or position < 0
            or len(tally) not in (0, 5)
            or math.isnan(best + robust)
            or not 0 <= seconds < math.inf
        ):
            raise ValueError
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, OverflowError):
        raise UserError("the checkpoint's epoch, best_acc1 or progress makes no sense") from None
    if position and changed:
        return progress, (
            f"the file was saved in mid-epoch with other {' and '.join(changed)}: "
            f"epoch {progress.epoch + 1} starts over"
        )
    progress.position, progress.tally, progress.seconds = position, tally, seconds
    return progress, None


def load_scaler(scaler: torch.amp.GradScaler, content: dict) -> None:
    """Restore by how much gradients are scaled in float16, where that is what the run did.

    Raises:
        UserError: the content makes no sense.
    """
    saved = content.get("scaler")
    try:
        if not (scaler.is_enabled() and saved):
            return
        scale, grown = float(saved["scale"]), int(saved["_growth_tracker"])
        if not 0 < scale < math.inf:
            raise ValueError
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, OverflowError):
        raise UserError("the checkpoint's scaler makes no sense") from None
    scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": grown})


def load_watchdog(watchdog: CatastrophicOverfittingGuard, model: nn.Module, content: dict) -> None:
    """Restore what an adversarial run knows of its robustness; other files know nothing of it.

    Raises:
        UserError: the content makes no sense.
    """
    saved = content.get("watchdog")
    if saved is None:
        return
    try:
        known = float(saved["best"]), int(saved["epoch"]), dict(saved["weights"])
        began = known[0] > 0 or known[2]
        if began and (
            state_dict_mismatch(model, known[2]) or first_nonfinite({"state_dict": known[2]})
        ):
            raise ValueError
        if not math.isfinite(known[0]):
            raise ValueError
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, OverflowError):
        raise UserError("the checkpoint's watchdog makes no sense") from None
    watchdog.best, watchdog.epoch, watchdog.weights = known


def skipped_images(content: dict) -> list[str] | None:
    """The images that the run does without, None where the file does not say.

    Raises:
        UserError: the content makes no sense.
    """
    names = content.get("left_out")
    if names is not None and not (isinstance(names, list) and {str} >= set(map(type, names))):
        raise UserError("the checkpoint's left_out makes no sense")
    return names


def first_nonfinite(content: dict) -> str | None:
    """The first of a checkpoint's weights and moments that holds nan or inf."""
    moments = content.get("optimizer", {}).get("state", {})
    tensors = {f"moment {k} of {i}": v for i, s in moments.items() for k, v in s.items()}
    tensors |= content["state_dict"]
    bad = (k for k, v in tensors.items() if isinstance(v, Tensor) and not v.isfinite().all())
    return next(bad, None)
