"""CIFAR-10 and MiniPlaces as uint8 tensors (N, 3, H, W), decoded once, and their batches.

<root>/cifar10/{train,test}/<class>/*       class folders, or
<root>/cifar-10-batches-py/                 as torchvision's downloader leaves it, or
<root>/images/, train.txt, val.txt          MiniPlaces; its validation set is the test set
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from custom_dataloader import MiniPlacesLoader, count_classes
from custom_transforms import CenterCrop, Compose, Scale
from deepvision.data.decoded import DecodedImages, cache_path, map_file, open_or_build
from utils import UserError, load_image

DATASETS = ("cifar10", "miniplaces")
HELD_OUT = 0.04  # fraction of the training images that selects checkpoints
PARTITION_SEED = 771  # of the held-out images: the same ones for every seed of a run
NO_IMAGES = ("thumbs.db", "desktop.ini")  # Windows leaves them in folders; names are case-blind


@dataclass
class Images:
    """x: uint8 (N, 3, H, W); y: int64 (N,); classes: the names of the categories."""

    x: Tensor
    y: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.y)

    def take(self, indices: Tensor) -> Images:
        """The images at `indices`, in that order."""
        return Images(self.x[indices], self.y[indices], self.classes)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images in [0, 1] and labels, in order; the last batch may be smaller."""
        for i in range(0, len(self), size):
            yield as_pixels(self.x[i : i + size]), self.y[i : i + size]


def as_pixels(x: Tensor) -> Tensor:
    """uint8 levels (0-255) as float32 in [0, 1]."""
    return x.float().div_(255)


def permutation(n: int, seed: int) -> Tensor:
    """A random order of n items, int64 (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@dataclass
class ImageIndex:
    """The images of one split before they are read.

    root: where the file of decoded images is kept; images are read from `folder`/`paths[i]`.
    prepare: applied to each decoded image (H, W, 3); its repr is part of the file's name.
    pixels: all images (N, H, W, 3) uint8, where they need no decoding.
    """

    root: Path
    name: str
    y: Tensor
    classes: list[str]
    folder: Path = Path()
    paths: tuple[str, ...] = ()
    prepare: Callable[[np.ndarray], np.ndarray] | None = None
    pixels: np.ndarray | None = None

    def sample(self, seed: int, limit: int | None = None) -> Images:
        """The first `limit` images in the seed's order: the index is sorted by class."""
        return self.read(permutation(len(self.y), seed)[:limit])

    def split(self, seed: int, limit: int | None = None) -> tuple[Images, Images]:
        """At most `limit` images to train on, in the seed's order, and the held-out images."""
        order = permutation(len(self.y), PARTITION_SEED)
        held_out = max(1, round(HELD_OUT * len(order)))
        train, val = order[held_out:], order[:held_out][:limit]
        return self.read(train[permutation(len(train), seed)][:limit]), self.read(val)

    def read(self, indices: Tensor) -> Images:
        """The images at `indices`, from the file of decoded images where there is one.

        That file is written when at least half of the images are asked for.

        Raises:
            UserError: an image cannot be read or has another size than the first.
        """
        pixels = self._array(len(indices) >= len(self.y) / 2)
        if pixels is None:
            pixels = np.stack([self._decoded[i][0] for i in indices.tolist()])
        else:
            pixels = pixels[indices.numpy()]
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        return Images(x, self.y[indices], self.classes)

    def read_one(self, index: int) -> np.ndarray:
        """Decode and prepare one image: uint8 (H, W, 3)."""
        image = load_image(self.folder / self.paths[index])
        return self.prepare(image) if self.prepare else image

    @cached_property
    def _decoded(self) -> DecodedImages:
        return DecodedImages(self.read_one, self.folder, self.paths, self.name)

    @cached_property
    def _cache_path(self) -> Path:
        return cache_path(self._decoded, self.root, repr(self.prepare))

    def _array(self, build: bool) -> np.ndarray | None:
        """All images (N, H, W, 3); None if they are in no file and none is to be built."""
        if self.pixels is not None:
            return self.pixels
        path, images = self._cache_path, self._decoded
        array = map_file(path, images.shape)
        if array is not None or not build:
            return array
        try:
            return open_or_build(path, images, workers=0).array
        except OSError as e:
            print(f"Decoded images are not kept: cannot write {path}: {e.strerror}.")
            return None


def list_images(dataset: str, root: Path, split: str) -> ImageIndex:
    """The index of a data set's split, train or test.

    Raises:
        UserError: the data set is not below `root`, or its two splits have different classes.
    """
    if dataset == "miniplaces":
        return _list_miniplaces(root, "train" if split == "train" else "val")
    if (root / "cifar10" / split).is_dir():
        return _list_folders(root / "cifar10", split)
    if (root / "cifar-10-batches-py").is_dir():
        return _list_torchvision(root, split)
    raise UserError(
        f"no CIFAR-10 in {root}: put class folders at {root / 'cifar10'}/{{train,test}}/<class>/, "
        "or add --download"
    )


def _list_folders(folder: Path, split: str) -> ImageIndex:
    """Class folders; hidden files and folders, and those that Windows leaves, are skipped."""
    classes = _visible(folder / split, Path.is_dir)
    other = folder / ("test" if split == "train" else "train")
    if other.is_dir() and (others := _visible(other, Path.is_dir)) != classes:
        unlike = sorted({*classes} ^ {*others})
        raise UserError(
            f"{folder / split} and {other} have different classes: {', '.join(unlike)}; "
            "the label of an image is its folder's place in the alphabet"
        )
    files = {name: _visible(folder / split / name, Path.is_file) for name in classes}
    if empty := [name for name in classes if not files[name]]:
        raise UserError(f"{folder / split / empty[0]} has no images")
    if not classes:
        raise UserError(f"{folder / split} has no class folders")
    y = torch.repeat_interleave(torch.tensor([len(files[name]) for name in classes]))
    paths = tuple(f"{name}/{file}" for name in classes for file in files[name])
    return ImageIndex(folder.parent, f"cifar10-{split}", y, classes, folder / split, paths)


def _visible(folder: Path, kind: Callable[[Path], bool]) -> list[str]:
    """The names of the files or folders in `folder`, sorted."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if kind(path) and path.name[0] != "." and path.name.lower() not in NO_IMAGES
    )


def _list_torchvision(root: Path, split: str, download: bool = False) -> ImageIndex:
    from torchvision.datasets import CIFAR10

    try:
        found = CIFAR10(root, train=split == "train", download=download)
    except (OSError, RuntimeError) as e:  # missing, damaged, or the network
        reason = str(e).splitlines()[0]
        raise UserError(f"torchvision's CIFAR-10 in {root}: {reason}; try --download") from None
    return ImageIndex(
        root, "cifar10", torch.tensor(found.targets), found.classes, pixels=found.data
    )


def _list_miniplaces(root: Path, split: str) -> ImageIndex:
    images = MiniPlacesLoader(root, None, count_classes(root), split)
    names = images.get_index_mapping()
    classes = [names.get(str(i), str(i)) for i in range(images.num_classes)]
    return ImageIndex(
        root,
        f"miniplaces-{split}",
        torch.tensor(images.labels),
        classes,
        images.image_folder,
        tuple(images.paths),
        Compose([Scale(144), CenterCrop(128)]),  # the input of main.py's classifiers
    )


def download_cifar10(root: Path) -> None:
    """Download by torchvision, unless the class folders are there."""
    if not (root / "cifar10").is_dir():
        _list_torchvision(root, "train", download=True)


class AugmentedBatches:
    """Shuffled training batches; each image is shifted and mirrored at random.

    Yields float images in [0, 1], (size, 3, H, W), and labels (size,).

    The order of an epoch follows from (seed, epoch), the augmentation of an image from (seed,
    epoch, index). The last partial batch is dropped, unless it is the only one.
    """

    def __init__(self, images: Images, size: int, seed: int):
        self.images, self.size, self.seed, self.epoch = images, size, seed, 0

    def __len__(self) -> int:
        return max(1, len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        sequence = np.random.SeedSequence(self.seed, spawn_key=(self.epoch,))
        rng, n = np.random.default_rng(sequence), len(self.images)
        order = torch.from_numpy(rng.permutation(n))
        # by image, not by place in the order
        shifts = torch.from_numpy(rng.integers(2 * _padding(self.images.x) + 1, size=(n, 2)))
        flips = torch.from_numpy(rng.random(n) < 0.5)
        for i in range(len(self)):
            chosen = order[i * self.size : (i + 1) * self.size]
            images = self.images.take(chosen)
            x = shift_and_flip(images.x, shifts[chosen], flips[chosen])
            yield as_pixels(x), images.y


def _padding(x: Tensor) -> int:
    return x.shape[2] // 8


def shift_and_flip(x: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Crop each image (N, C, H, W) from its black-padded self, and flip it or not.

    shifts: int64 (N, 2), top and left of the crops, from 0 to 2 * (H // 8); flips: bool (N,).
    """
    N, C, H, W = x.shape
    padded = F.pad(x, (_padding(x),) * 4)
    rows, cols = shifts[:, :1] + torch.arange(H), shifts[:, 1:] + torch.arange(W)  # (N, H), (N, W)
    cols = torch.where(flips[:, None], cols.flip(1), cols)
    n, c = torch.arange(N).view(N, 1, 1, 1), torch.arange(C).view(1, C, 1, 1)
    return padded[n, c, rows.view(N, 1, H, 1), cols.view(N, 1, 1, W)]
