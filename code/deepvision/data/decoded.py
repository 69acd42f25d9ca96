"""Images decoded once, in a file in the data folder whose name follows from their sources.

The file holds N images of one size as bytes (N, H, W, 3). It is mapped into memory, so that the
system's page cache serves all processes. Runs that share a data folder share it: one builds the
file while the others wait, and none deletes a file that another one uses.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from deepvision.data.loader import validation_batches
from deepvision.runtime.console import progress_bar
from utils import DECODER, UserError

try:
    import fcntl
except ImportError:  # Windows: runs that start together all build, and no file is ever deleted
    fcntl = None


class DecodedImages(Dataset):
    """Images before their augmentation, RGB uint8 (H, W, 3), all of the shape of the first.

    Args:
        read: index -> image.
        folder, paths: image i is read from the file `folder`/`paths[i]`.
        name: of the data set, for progress bars and cache files.

    Raises:
        UserError: the first image cannot be read.
    """

    def __init__(
        self,
        read: Callable[[int], np.ndarray],
        folder: Path,
        paths: Sequence[str],
        name: str,
    ) -> None:
        self.read, self.folder, self.paths, self.name = read, folder, paths, name
        self.shape = len(paths), *read(0).shape  # (N, H, W, 3)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray]:
        image = self.read(index)
        if image.shape != self.shape[1:]:
            (height, width), (h, w) = image.shape[:2], self.shape[1:3]
            raise UserError(
                f"{self.paths[index]} has {width}×{height} pixels and the first image {w}×{h}: "
                "--cache and reverse_attack need images of one size"
            )
        return (image,)

    @property
    def nbytes(self) -> int:
        """Bytes of all decoded images."""
        return math.prod(self.shape)

    def batches(self, workers: int) -> Iterator[Tensor]:
        """All images in order, in batches (n, H, W, 3), uint8.

        Raises:
            UserError: an image cannot be read or has another size.
        """
        with progress_bar(len(self), f"decoding {self.name}") as bar:
            for (images,) in validation_batches(self, workers):
                yield images
                bar.update(len(images))

    def fingerprint(self, preparation: str) -> str:
        """Changes with the list of images, any file's size or time, the decoder, and `preparation`.

        Raises:
            UserError: a file is missing.
        """
        content = hashlib.blake2b(f"{DECODER} {preparation}\n".encode(), digest_size=8)
        for path in self.paths:
            try:
                stat = os.stat(self.folder / path)
            except OSError as e:
                reason = f"cannot read the image {self.folder / path}: {e.strerror}"
                raise UserError(reason) from None
            content.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return content.hexdigest()


class FileImages:
    """The images in a file that `open_or_build` returned; travels to workers by its path."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        array = map_file(path, shape)
        if array is None:
            raise UserError(f"the cache file {path} is gone: start again")
        self.path, self.array = path, array  # (N, H, W, 3)

    def read(self, index: int) -> np.ndarray:
        """One image (H, W, 3); the caller may write into it."""
        return np.array(self.array[index])

    def __reduce__(self) -> tuple:
        return FileImages, (self.path, self.array.shape)


def cache_path(images: DecodedImages, folder: Path, preparation: str = "") -> Path:
    """Where the decoded images are kept. preparation: what `images.read` does after decoding."""
    return folder / f"{images.name}.decoded-{images.fingerprint(preparation)}"


def open_or_build(path: Path, images: DecodedImages, workers: int) -> FileImages:
    """The images in the file at `cache_path`, which is built where it is missing or not whole.

    Raises:
        OSError: the file cannot be written.
        UserError: an image cannot be read or has another size.
    """
    with contextlib.suppress(UserError):
        return FileImages(path, images.shape)
    stem = path.name.rpartition("-")[0]
    with open(path.with_name(f"{stem}.lock"), "wb") as lock:
        _lock(lock, exclusive=True)  # until the file is closed, by the system at the latest
        if map_file(path, images.shape) is None:
            _delete_unused(path.parent, f"{stem}-*")
            _build(path, images, workers)
        return FileImages(path, images.shape)


def map_file(path: Path, shape: tuple[int, ...]) -> np.memmap | None:
    """The file as a read-only array that no other run deletes; None if it is missing or not whole.

    The lock belongs to the open file, of which the mapping holds a duplicate: it ends with it.
    """
    try:
        with open(path, "rb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                _lock(file, exclusive=False)
            status = os.fstat(file.fileno())
            if status.st_size != math.prod(shape) or status.st_nlink == 0:  # deleted meanwhile
                return None
            return np.memmap(file, np.uint8, "r", shape=shape)
    except OSError:
        return None


def _lock(file: BinaryIO, exclusive: bool, wait: bool = True) -> None:
    if fcntl:
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)


def _delete_unused(folder: Path, pattern: str) -> None:
    """Delete the files that no run has mapped: stale ones, and those of a killed build."""
    for path in folder.glob(pattern) if fcntl else ():
        with contextlib.suppress(OSError), open(path, "rb") as file:
            _lock(file, exclusive=True, wait=False)
            path.unlink()


def _build(path: Path, images: DecodedImages, workers: int) -> None:
    """Write a temporary file, sync it to disk, rename it."""
    free = shutil.disk_usage(path.parent).free
    if images.nbytes > free:
        sizes = f"{images.nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        raise OSError(errno.ENOSPC, sizes)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            for batch in images.batches(workers):
                file.write(batch.numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
