"""CIFAR-10 and MiniPlaces as uint8 tensors (N, 3, H, W), decoded once, and their batches.

<root>/cifar10/{train,test}/<class>/*       class folders, or
<root>/cifar-10-batches-py/                 what torchvision's downloader leaves, or
<root>/images/, train.txt, val.txt          MiniPlaces; its validation set is the test set
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from custom_dataloader import MiniPlacesLoader, count_classes
from custom_transforms import CenterCrop, Compose, Scale
from utils import UserError, load_image

DATASETS = ("cifar10", "miniplaces")
HELD_OUT = 0.04  # the share of the training images that chooses checkpoints
PARTITION_SEED = 771  # of the held-out slice: the same one, whatever the seed of a run


@dataclass
class Images:
    """x: uint8 `(N, 3, H, W)`; y: int64 `(N,)`; classes: the categories' names."""

    x: Tensor
    y: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.y)

    def take(self, indices: Tensor) -> Images:
        return Images(self.x[indices], self.y[indices], self.classes)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images in [0, 1] and labels, in order; the last batch may be smaller."""
        for i in range(0, len(self), size):
            yield as_pixels(self.x[i : i + size]), self.y[i : i + size]


def as_pixels(x: Tensor) -> Tensor:
    return x.float().div_(255)


def permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@dataclass
class ImageIndex:
    """The images of one split before they are read: where they are, and their labels."""

    root: Path
    name: str
    y: Tensor
    classes: list[str]
    paths: Sequence[Path] = ()
    prepare: Callable[[np.ndarray], np.ndarray] = lambda image: image
    pixels: np.ndarray | None = None  # (N, H, W, 3), once they are known

    def sample(self, seed: int, limit: int | None = None) -> Images:
        """The first `limit` images in the seed's order: class folders are sorted by class."""
        return self.read(permutation(len(self.y), seed)[:limit])

    def split(self, seed: int, limit: int | None = None) -> tuple[Images, Images]:
        """At most `limit` images to train on, in the seed's order, and the held-out slice."""
        order = permutation(len(self.y), PARTITION_SEED)
        held_out = max(1, round(HELD_OUT * len(order)))
        train, val = order[held_out:], order[:held_out][:limit]
        return self.read(train[permutation(len(train), seed)][:limit]), self.read(val)

    def read(self, indices: Tensor) -> Images:
        """Some of the images: from the cache if it holds these very files, else decoded.

        The cache is written when most of the images are asked for.
        """
        if self.pixels is None and len(indices) < len(self.y) / 2:
            cache = self._cache()
            few = np.load(cache, mmap_mode="r") if cache.exists() else None
            pixels = self._decode(indices) if few is None else few[indices.numpy()]
        else:
            pixels = self._all()[indices.numpy()]
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        return Images(x, self.y[indices], self.classes)

    def _all(self) -> np.ndarray:
        if self.pixels is None:
            cache = self._cache()
            if cache.exists():
                self.pixels = np.load(cache, mmap_mode="r")
            else:
                self.pixels = self._decode(range(len(self.y)))
                with contextlib.suppress(OSError):  # a read-only data folder works, only slower
                    cache.parent.mkdir(exist_ok=True)
                    np.save(partial := cache.with_suffix(".part.npy"), self.pixels)
                    partial.replace(cache)
        return self.pixels

    def _cache(self) -> Path:
        """Its name changes with any file's name, size or time."""
        sums = hashlib.sha256()
        for path in self.paths:
            stat = path.stat()
            sums.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return self.root / "cache" / f"{self.name}-{sums.hexdigest()[:12]}.npy"

    def _decode(self, indices: Iterable[int]) -> np.ndarray:
        images = []
        for i in tqdm(indices, desc=f"reading {self.name}", leave=False, disable=None):
            images.append(self.prepare(load_image(self.paths[i])))
            if images[-1].shape != images[0].shape:
                width, height = images[-1].shape[1::-1]
                raise UserError(f"{self.paths[i]} has {width}x{height} pixels, others have not")
        return np.stack(images)


def list_images(dataset: str, root: Path, split: str) -> ImageIndex:
    """
    Raises:
        UserError: the data set is not below `root`.
    """
    if dataset == "miniplaces":
        return _list_miniplaces(root, "train" if split == "train" else "val")
    if (root / "cifar10" / split).is_dir():
        return _list_folders(root, split)
    if (root / "cifar-10-batches-py").is_dir():
        return _list_torchvision(root, split)
    raise UserError(
        f"no CIFAR-10 in {root}: put class folders at {root / 'cifar10'}/{{train,test}}/<class>/, "
        "or add --download"
    )


def _list_folders(root: Path, split: str) -> ImageIndex:
    folder = root / "cifar10" / split
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = [
        sorted(p for p in (folder / c).iterdir() if p.is_file() and p.name[0] != ".")
        for c in classes
    ]
    if not all(files) or not classes:
        raise UserError(f"{folder} has no class folders, or one without images")
    y = torch.repeat_interleave(torch.tensor([len(f) for f in files]))
    return ImageIndex(root, f"cifar10-{split}", y, classes, [p for f in files for p in f])


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
    loader = MiniPlacesLoader(root, None, count_classes(root), split)
    names = loader.get_index_mapping()
    classes = [names.get(str(i), str(i)) for i in range(loader.num_classes)]
    paths = [loader.image_folder / p for p in loader.paths]
    centre = Compose([Scale(144), CenterCrop(128)])  # what main.py's classifiers are shown
    return ImageIndex(
        root, f"miniplaces-{split}", torch.tensor(loader.labels), classes, paths, centre
    )


def download_cifar10(root: Path) -> None:
    """By torchvision's own downloader, if neither form is there yet."""
    if not (root / "cifar10").is_dir():
        _list_torchvision(root, "train", download=True)


class AugmentedBatches:
    """Shuffled training batches, padded and cropped and mirrored at random, image by image.

    The order and the augmentation of an epoch follow from (seed, epoch). The last partial batch is
    dropped, unless it is the only one.
    """

    def __init__(self, images: Images, size: int, seed: int):
        self.images, self.size, self.seed, self.epoch = images, size, seed, 0

    def __len__(self) -> int:
        return max(1, len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        order = torch.randperm(len(self.images), generator=generator)
        for i in range(len(self)):
            chosen = self.images.take(order[i * self.size : (i + 1) * self.size])
            yield as_pixels(crop_and_flip(chosen.x, generator)), chosen.y


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to an eighth of its size, black beyond it, and mirrored or not."""
    N, C, H, W = x.shape
    pad = H // 8
    padded = F.pad(x, (pad,) * 4)
    top, left = torch.randint(2 * pad + 1, (2, N, 1), generator=generator)
    rows, cols = top + torch.arange(H), left + torch.arange(W)  # (N, H), (N, W)
    flip = torch.rand(N, 1, generator=generator) < 0.5
    cols = torch.where(flip, cols.flip(1), cols)
    n, c = torch.arange(N).view(N, 1, 1, 1), torch.arange(C).view(1, C, 1, 1)
    return padded[n, c, rows.view(N, 1, H, 1), cols.view(N, 1, 1, W)]
