"""Atomic file replacement: after a crash, a file holds its old content or its new one, whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from deepvision.runtime import distributed
from utils import UserError


def write_atomically(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Replace `path` by `data`: write a temporary file, sync it to disk, rename it.

    In a distributed run only rank 0 writes.

    previous: where the old content is kept. It is moved there after the new content is in place,
        because the old file may be damaged and `previous` the only valid one.

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
        raise UserError(f"cannot write {path}: {e.strerror}; the old content is intact") from None


def _link(path: Path, spare: Path) -> None:
    spare.unlink(missing_ok=True)  # left by a run that was killed
    try:
        os.link(path, spare)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, spare)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder and does not need to sync it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
