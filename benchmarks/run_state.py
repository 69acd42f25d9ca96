"""What a training run ends with, in a form that two runs can be compared by."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))

from deepvision.runtime.run_logger import MACHINE_COLUMNS  # noqa: E402

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each point it purges


def final_state(folder: Path) -> dict[str, object]:
    """Everything a run leaves that does not depend on the clock."""
    last, best = (
        torch.load(folder / "models" / name, weights_only=True)
        for name in ("checkpoint.pth.tar", "model_best.pth.tar")
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": digest(last["state_dict"]),
        "trained": digest(last.get("trained")),
        "optimizer": digest(last["optimizer"]),
        "schedule": [last["scheduler"][k] for k in ("last_epoch", "_last_lr")],
        "epochs": last["epoch"],
        "best accuracy": last["best_acc1"],
        "best weights": digest(best["state_dict"]),
        "rows": [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in rows],
        "points": {str(f.relative_to(folder)): points(f) for f in event_folders(folder)},
    }


def digest(value: object) -> str:
    """A hash of nested dictionaries, lists, tensors and plain values."""
    pieces = hashlib.sha256()
    for piece in flat(value):
        pieces.update(piece)
    return pieces.hexdigest()


def flat(value: object) -> Iterator[bytes]:
    if isinstance(value, dict):
        for key in value:
            yield f"{key}:".encode()
            yield from flat(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)} ".encode() + value.numpy().tobytes()
    else:
        yield repr(value).encode()


def event_folders(folder: Path) -> list[Path]:
    return sorted({file.parent for file in folder.rglob("events.out.tfevents.*")})


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: the points of each curve, in the order it has them."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
