"""Images decoded once and kept: in shared memory, in a file beside the data, or on the device.

`keep` gives a data set another way to read. From RAM and from disk comes the very array that the
file decodes to. On the device, the loader's workers only draw what is to be done to each image;
whole batches are warped, coloured and normalised where they are needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from custom_affine import Affine, compose
from custom_dataloader import MiniPlacesLoader
from custom_transforms import AUGMENTATION, FUSED, Compose, sample_warp
from deepvision.data.loader import validation_batches
from deepvision.runtime.console import progress_bar
from utils import UserError

try:
    import fcntl
except ImportError:  # Windows: two runs that start together both build
    fcntl = None


def enable_cache(dataset: MiniPlacesLoader, place: str, workers: int, device: torch.device) -> None:
    """Have `dataset` read from RAM, disk or the device from now on, instead of from image files.

    Raises:
        UserError: there is no room, an image cannot be read or has a size of its own, or, on the
            device, the transforms are not the course's.
    """
    if place == "none":
        return
    first = dataset.read(0)
    size = len(dataset) * first.nbytes
    if place == "disk":
        shape = len(dataset), *first.shape
        dataset.read = FileImages(cache_file(dataset, shape, workers), shape).read
    elif place == "ram":
        check_free_space(dataset, "ram", size, free_memory())
        images = torch.empty(len(dataset), *first.shape, dtype=torch.uint8).share_memory_()
        dataset.read = RamImages(fill(images, dataset, workers)).read
    elif place == "device":
        plan = AugmentParams(dataset.transforms, first.shape)
        check_free_space(dataset, str(device), size, free_memory(device))
        images = torch.empty(len(dataset), *first.shape, dtype=torch.uint8, device=device)
        images = DeviceImages(fill(images, dataset, workers), plan)
        dataset.read, dataset.transforms, dataset.device_transform = (
            images.read,
            plan,
            images.device_transform,
        )


def fill(images: Tensor, dataset: MiniPlacesLoader, workers: int) -> Tensor:
    start = 0
    for batch in decoded(dataset, images.shape[1:], workers):
        images[start : start + len(batch)] = batch
        start += len(batch)
    return images


def decoded(dataset: MiniPlacesLoader, shape: tuple, workers: int) -> Iterator[Tensor]:
    """All images in order, in batches (n, H, W, 3), uint8."""
    with progress_bar(len(dataset), f"decoding {dataset.split}") as bar:
        for images, _ in validation_batches(Decoded(dataset, shape), workers):
            yield images
            bar.update(len(images))


class Decoded(Dataset):
    """A data set's images (H, W, 3) without its transforms, all of one shape."""

    def __init__(self, dataset: MiniPlacesLoader, shape: tuple) -> None:
        self.dataset, self.shape = dataset, tuple(shape)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = self.dataset.read(index)
        if image.shape != self.shape:
            (height, width), (h, w) = image.shape[:2], self.shape[:2]
            raise UserError(
                f"--cache needs images of one size: {self.dataset.paths[index]} has "
                f"{width}×{height} pixels and the first has {w}×{h}; leave --cache out"
            )
        return image, self.dataset.labels[index]


def check_free_space(dataset: MiniPlacesLoader, place: str, size: int, free: int) -> None:
    """Say what the cache takes.

    Raises:
        UserError: there is less.
    """
    needs = f"{len(dataset)} {dataset.split} images take {size / 1e9:.2f} GB"
    if size > free:
        raise UserError(f"--cache: {needs} and {place} has {free / 1e9:.2f} GB free: use another")
    known = "" if free == sys.maxsize else f" of {free / 1e9:.2f} GB free"
    print(f"Cache: {needs}{known} ({place}).")


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that may be taken on a device, by default in memory that processes share."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = sys.maxsize
    with contextlib.suppress(OSError):  # elsewhere than on Linux nobody says
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
        if device is None:
            free = min(free, shutil.disk_usage("/dev/shm").free)
    return free


class RamImages:
    def __init__(self, images: Tensor) -> None:
        self.images = images  # (N, H, W, 3) in memory that workers share

    def read(self, index: int) -> np.ndarray:
        return self.images.numpy()[index].copy()  # a transform may write into it


# ---------------------------------------------------------------------------------------------
# Disk
# ---------------------------------------------------------------------------------------------


class FileImages:
    """A file of images, mapped into memory; the system's page cache serves all processes."""

    def __init__(self, path: Path, shape: tuple) -> None:
        self.path = path
        self.images = np.memmap(path, np.uint8, "r", shape=shape)  # (N, H, W, 3)

    def read(self, index: int) -> np.ndarray:
        return np.array(self.images[index])

    def __reduce__(self) -> tuple:
        return FileImages, (self.path, self.images.shape)  # or a copy would travel to each worker


def cache_file(dataset: MiniPlacesLoader, shape: tuple, workers: int) -> Path:
    """The file that holds the images as they are now, made if there is none.

    Its name tells the paths, sizes and times of the image files: one that is stale is never found.
    """
    stem = dataset.root_folder / f"{dataset.split}.decoded"
    path = stem.with_name(f"{stem.name}-{fingerprint(dataset)}")
    try:
        if not is_whole(path, shape):
            with locked(stem.with_name(f"{stem.name}.lock")):
                if not is_whole(path, shape):
                    for stale in path.parent.glob(f"{stem.name}-*"):
                        stale.unlink()
                    build(path, dataset, shape, workers)
    except OSError as e:
        raise UserError(
            f"--cache=disk: cannot write {path}: {e.strerror}; --cache=ram needs no file"
        ) from None
    return path


def is_whole(path: Path, shape: tuple) -> bool:
    return path.exists() and path.stat().st_size == math.prod(shape)


def build(path: Path, dataset: MiniPlacesLoader, shape: tuple, workers: int) -> None:
    """Write the file beside its place, have the disk hold it, rename it."""
    check_free_space(dataset, "disk", math.prod(shape), shutil.disk_usage(path.parent).free)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            for images in decoded(dataset, shape[1:], workers):
                file.write(images.numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def fingerprint(dataset: MiniPlacesLoader) -> str:
    """Changes with the list of images, any file's size or time, and the library that decodes."""
    content = hashlib.blake2b(cv2.__version__.encode(), digest_size=8)
    for name in dataset.paths:
        path = dataset.image_folder / name
        try:
            stat = path.stat()
        except OSError as e:
            raise UserError(f"cannot read the image {path}: {e.strerror}") from None
        content.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return content.hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait while another process holds the lock; the system frees a dead process's."""
    with open(path, "wb") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------
# Device
# ---------------------------------------------------------------------------------------------


class AugmentParams:
    """In place of a transformed image, what to do to it: a float tensor (10,) of its index, its
    warp (2, 3), and its gain per channel; drawn like the transforms' own, from `random`.
    """

    def __init__(self, transforms: Compose, shape: tuple) -> None:
        self.steps = getattr(transforms, "transforms", [])
        self.source = shape[1], shape[0]  # width, height
        if tuple(map(type, self.steps)) not in FUSED:
            raise UserError("--cache=device knows the course's transforms alone: use --cache=ram")
        scale = self.steps[0]
        width, height = scale.target(*self.source)
        reduced = self.source[0] > 2 * width or self.source[1] > 2 * height
        if reduced or scale.interpolation != cv2.INTER_LINEAR:
            raise UserError("--cache=device scales by little, and bilinearly: use --cache=ram")
        self.size, self.normalize = self.steps[-3].size, self.steps[-1]

    def __call__(self, index: int) -> Tensor:
        warp, gains = self.draw()
        return torch.tensor([index, *warp, *gains])

    def draw(self) -> tuple[Affine, list[float]]:
        if len(self.steps) == len(AUGMENTATION) + 2:
            return sample_warp(self.source, *self.steps[:-2])
        width, height = self.steps[0].target(*self.source)
        x, y = (width - self.size[0]) // 2, (height - self.size[1]) // 2
        scale = (self.source[0] / width, 0, 0, 0, self.source[1] / height, 0)
        return compose(scale, (1, 0, x, 0, 1, y)), [1, 1, 1]


class DeviceImages:
    """All images (N, H, W, 3) as uint8 on a device, where `Plan`s are carried out in batches."""

    def __init__(self, images: Tensor, plan: AugmentParams) -> None:
        self.images = images
        width, height = plan.size
        self.x = torch.arange(width, device=images.device)[:, None] + 0.5  # (w, 1)
        self.y = torch.arange(height, device=images.device)[:, None, None] + 0.5  # (h, 1, 1)
        self.source = torch.tensor(plan.source, device=images.device)
        self.mean, self.std = (
            torch.tensor(v, device=images.device)[:, None, None]
            for v in (plan.normalize.mean, plan.normalize.std)
        )

    def read(self, index: int) -> int:
        return index

    def device_transform(self, plans: Tensor) -> Tensor:
        """(B, 10) -> images (B, 3, h, w), each step rounded to grey levels as on the CPU."""
        plans = plans.to(self.images.device, non_blocking=True)
        warps, gains = plans[:, 1:7].view(-1, 1, 1, 2, 3), plans[:, 7:, None, None]
        x = self.images[plans[:, 0].long()].permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        # sums, not a product of matrices: TF32 would lose a tenth of a pixel
        seen_at = warps[..., 0] * self.x + warps[..., 1] * self.y + warps[..., 2]  # (B, h, w, 2)
        grid = 2 * seen_at / self.source - 1
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False).round_()
        x = x.mul_(gains).add_(0.5).clamp_(max=255).floor_()
        return (x / 255 - self.mean) / self.std

    def __getstate__(self) -> dict:
        return {}  # a worker only plans
