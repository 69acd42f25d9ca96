"""--cache: read images that are decoded already, from RAM, from a file or from the device.

RAM and file return exactly what the image file decodes to. With the device, the workers of the data
loader only draw the augmentation of each image (`device_augment`).
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from custom_dataloader import MiniPlacesLoader
from deepvision.data.decoded import DecodedImages, FileImages, cache_path, open_or_build
from deepvision.data.device_augment import AugmentParams, DeviceImages
from utils import UserError


def enable_caches(
    datasets: Sequence[MiniPlacesLoader],
    place: str,
    workers: int,
    device: torch.device,
    epochs: int,
    strict: bool,
) -> str:
    """Make the data sets read from `place`, or from what auto means; return the place.

    epochs: of training. strict: raise where a set cannot be cached; else it is left as it is, with
    a line. auto is never strict.

    Raises:
        UserError: as `enable_cache`.
    """
    if place == "auto":
        place, strict = auto_place(datasets, device, epochs), False
    used = place
    for dataset in datasets:
        try:
            enable_cache(dataset, place, workers, device)
        except UserError as e:
            if strict:
                raise
            used = "none"
            print(f"The {dataset.split} images are not cached: {e}.")
    return used


def auto_place(datasets: Sequence[MiniPlacesLoader], device: torch.device, epochs: int) -> str:
    """What auto means for these sets; a line says so where the device has too little memory."""
    try:
        nbytes = sum(decoded_images(dataset).nbytes for dataset in datasets)
    except UserError:  # an image cannot be read: to enable the cache names it
        nbytes = 0
    place, free = choose_cache(device.type, epochs, nbytes, sys.maxsize), free_memory(device)
    if place == "device" and choose_cache(device.type, epochs, nbytes, free) != place:
        print(
            f"The images are not cached: {nbytes / 1e9:.2f} GB is more than a third of the "
            f"{free / 1e9:.2f} GB free on {device}."
        )
        return "none"
    return place


def choose_cache(device: str, epochs: int, nbytes: int, free: int) -> str:
    """device, where decoding once pays and the images fit in a third of the free memory; or none.

    device: its type. epochs: of training. nbytes: of the decoded images. free: bytes there.
    """
    return "device" if device == "cuda" and epochs >= 2 and 3 * nbytes <= free else "none"


def decoded_images(dataset: MiniPlacesLoader) -> DecodedImages:
    """The images of a data set before their augmentation."""
    return DecodedImages(dataset.read, dataset.image_folder, dataset.paths, dataset.split)


def enable_cache(dataset: MiniPlacesLoader, place: str, workers: int, device: torch.device) -> None:
    """Make `dataset` read from `place` (none, ram, disk, device) instead of from image files.

    Raises:
        UserError: there is too little space, an image cannot be read or has another size than the
            first, or, on the device, the transforms are not the course's.
    """
    if place == "none":
        return
    images = decoded_images(dataset)
    if place == "ram":
        dataset.read = ram_images(images, workers).read
    elif place == "disk":
        dataset.read = file_images(images, dataset.root_folder, workers).read
    elif place == "device":
        check_sampling(device)
        AugmentParams(dataset.transforms, images.shape[1:])  # raises before images are decoded
        on_device = DeviceImages(fill(images, workers, device), dataset.transforms)
        dataset.read, dataset.transforms = on_device.read, on_device


def check_sampling(device: torch.device) -> None:
    """Raise UserError if PyTorch cannot warp images on `device`, as old versions on Apple's GPU."""
    x = torch.zeros(1, 1, 2, 2, device=device)
    try:
        F.grid_sample(x, x.new_zeros(1, 1, 1, 2), padding_mode="border", align_corners=False)
    except NotImplementedError:
        raise UserError(
            f"--cache=device: PyTorch {torch.__version__} cannot warp images on {device.type}: "
            "install a newer one, or use --cache=ram"
        ) from None


class RamImages:
    """Images (N, H, W, 3) in memory that workers share under every start method."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def read(self, index: int) -> np.ndarray:
        """One image (H, W, 3); the caller may write into it."""
        return self.images.numpy()[index].copy()


def ram_images(images: DecodedImages, workers: int) -> RamImages:
    """Decode all images into shared memory."""
    return RamImages(fill(images, workers, None))


def file_images(images: DecodedImages, folder: Path, workers: int) -> FileImages:
    """The images in a file in `folder`."""
    path = cache_path(images, folder)
    try:
        return open_or_build(path, images, workers)
    except OSError as e:
        raise UserError(
            f"--cache=disk: cannot write {path}: {e.strerror}; --cache=ram needs no file"
        ) from None


def fill(images: DecodedImages, workers: int, device: torch.device | None) -> Tensor:
    """All images (N, H, W, 3) as uint8 on `device`, or in shared memory for None.

    Raises:
        UserError: there is too little memory.
    """
    place = str(device or "ram")
    check_free_space(images, place, free_memory(device))
    try:
        memory = torch.empty(images.shape, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:  # another process has taken it meanwhile
        check_free_space(images, place, 0)
    memory = memory if device else memory.share_memory_()
    start = 0
    for batch in images.batches(workers):
        memory[start : start + len(batch)] = batch
        start += len(batch)
    return memory


def check_free_space(images: DecodedImages, place: str, free: int) -> None:
    """Print how much space the cache takes.

    Raises:
        UserError: there is less.
    """
    needs = f"{len(images)} {images.name} images take {images.nbytes / 1e9:.2f} GB"
    if images.nbytes > free:
        raise UserError(
            f"--cache: {needs} and {place} has {free / 1e9:.2f} GB free: use --cache=none"
        )
    known = "" if free == sys.maxsize else f" of {free / 1e9:.2f} GB free"
    print(f"Cache: {needs}{known} ({place}).")


def free_memory(device: torch.device | None = None) -> int:
    """Free bytes on a device, or of memory that processes share for None; maxsize if unknown."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = sys.maxsize
    with contextlib.suppress(OSError):  # systems other than Linux have no such file
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
        if device is None:
            free = min(free, shutil.disk_usage("/dev/shm").free)
    return free
