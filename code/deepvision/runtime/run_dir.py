"""Run folders: logs/<kind>_exp_<date and time>/, made, found and locked."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Container
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from deepvision.runtime import distributed
from deepvision.runtime.provenance import ROOT, commit
from utils import UserError, relpath

try:
    import fcntl
except ImportError:  # Windows has no POSIX locks: two processes may write to one run
    fcntl = None

LOGS = ROOT / "logs"


def new_run_dir(logs: Path, kind: str) -> Path:
    """Make the folder <kind>_exp_<date and time>, with models/ in it.

    In a distributed run rank 0 makes it; the others, which write nothing, get `logs`.

    Raises:
        UserError: `logs` is not writable.
    """
    if not distributed.is_main_process():
        return logs
    while True:
        run_dir = logs / f"{kind}_exp_{datetime.now():%Y-%m-%d_%H-%M-%S}"
        try:
            (run_dir / "models").mkdir(parents=True)
            return run_dir
        except FileExistsError:  # another run started within this second
            time.sleep(1)
        except OSError as e:
            raise UserError(f"cannot make the run folder {run_dir}: {e.strerror}") from None


def kind_and_start(run_dir: Path) -> tuple[str, str]:
    """The two parts of a run folder's name: kind, and date and time."""
    kind, _, start = run_dir.name.partition("_exp_")
    return kind, start


def run_dirs(logs: Path, kinds: Container[str]) -> list[Path]:
    """The run folders of these kinds, the newest first."""
    found = [f for f in logs.glob("*_exp_*") if f.is_dir() and kind_and_start(f)[0] in kinds]
    return sorted(found, key=lambda f: kind_and_start(f)[1], reverse=True)


def latest_run(logs: Path, kinds: Container[str]) -> Path | None:
    """The newest run folder of one of these kinds."""
    return next(iter(run_dirs(logs, kinds)), None)


def run_dir_of(checkpoint: str | Path, logs: Path) -> Path | None:
    """The run folder below `logs` that a checkpoint belongs to; None for one outside."""
    models = Path(checkpoint).resolve().parent
    inside = models.name == "models" and logs.resolve() in models.parent.parents
    return models.parent if inside else None


def run_launched_as(logs: Path, launch_id: str) -> Path | None:
    """The run that these processes had started before torchrun restarted them."""
    started = []
    for config in logs.glob("*_exp_*/config.json"):
        with contextlib.suppress(OSError, ValueError):
            if json.loads(config.read_bytes()).get("launch") == launch_id:
                started.append(config.parent)
    return max(started, key=lambda f: kind_and_start(f)[1], default=None)


def lock_run(run_dir: Path) -> BinaryIO | None:
    """An open file that keeps other processes from writing to the run until it is closed.

    The system closes it when the process dies. None where nothing can be written there.

    Raises:
        UserError: another process holds the lock.
    """
    with contextlib.suppress(OSError):
        file = open(run_dir / ".lock", "wb")  # noqa: SIM115
        try:
            if fcntl:  # not flock: workers that outlive the run would inherit and hold it
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            raise UserError(
                f"another process writes to {relpath(run_dir)}: wait for it, or stop it"
            ) from None
    return None


def append_evaluation(run_dir: Path, row: dict) -> None:
    """Append a row of -e or -a to evaluations.jsonl; a folder that is not writable stays as is."""
    if not distributed.is_main_process():
        return
    row = {"date": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "commit": commit(), **row}
    with contextlib.suppress(OSError), open(run_dir / "evaluations.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
