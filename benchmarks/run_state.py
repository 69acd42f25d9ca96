"""The final state of a training run, in a form that can be compared between runs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deepvision import checkpoint
from deepvision.runtime.jsonl import read_metrics
from deepvision.runtime.run_logger import MACHINE_COLUMNS

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it logs each point that it purges


def final_state(run_dir: Path) -> dict[str, object]:
    """Everything in a run folder that does not depend on time or machine, by name."""
    last, best = (
        torch.load(run_dir / "models" / name, weights_only=True)
        for name in (checkpoint.LAST, checkpoint.BEST)
    )
    rows = read_metrics(run_dir / "metrics.jsonl")
    return {
        "weights": digest(last["state_dict"]),
        "trained": digest(last.get("trained")),
        "optimizer": digest(last["optimizer"]),
        "schedule": [last["scheduler"][k] for k in ("last_epoch", "_last_lr")],
        "epochs": last["epoch"],
        "best accuracy": last["best_acc1"],
        "best weights": digest(best["state_dict"]),
        "rows": [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in rows],
        "points": {str(f.relative_to(run_dir)): points(f) for f in event_folders(run_dir)},
    }


def digest(value: object) -> str:
    """The SHA-256 of nested dictionaries, lists, tensors and plain values."""
    sha256 = hashlib.sha256()
    for data in flatten(value):
        sha256.update(data)
    return sha256.hexdigest()


def flatten(value: object) -> Iterator[bytes]:
    """The bytes of a nested value, piece by piece."""
    if isinstance(value, dict):
        for key in value:
            yield f"{key}:".encode()
            yield from flatten(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from flatten(item)
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)} ".encode() + value.numpy().tobytes()
    else:
        yield repr(value).encode()


def event_folders(run_dir: Path) -> list[Path]:
    """The folders that hold TensorBoard event files."""
    return sorted({file.parent for file in run_dir.rglob("events.out.tfevents.*")})


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of each curve that TensorBoard shows, by tag."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
