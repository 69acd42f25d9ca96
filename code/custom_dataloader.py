"""The MiniPlaces data set.

root/images/train/<letter>/<category>/NNNNNNNN.jpg      root/train.txt   "path label" per line,
root/images/val/NNNNNNNN.jpg                            root/val.txt     path below images/
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from utils import UserError, load_image

# Work is split by image, over processes. OpenCV's own threads would share the same cores, and a
# forked worker that inherits its thread pool can hang.
cv2.setNumThreads(0)

MAX_CLASSES = 10_000  # a mangled label must not become the size of a layer

GET_DATA = "get the images with: sh download_dataset.sh"


class MiniPlacesLoader(Dataset):
    """Images and labels of one split.

    `paths` (relative to `root_folder`/images) and `labels` are in the order of the label file.

    Args:
        label_file: if not `root_folder`/`split`.txt.
        transforms: called on each RGB uint8 array (H, W, 3).

    Raises:
        UserError: a folder or label file is missing, or a line of the label file is wrong.
    """

    def __init__(
        self,
        root_folder: str | Path,
        label_file: str | Path | None = None,
        num_classes: int = 100,
        split: str = "train",
        transforms: Callable | None = None,
    ) -> None:
        if split not in ("train", "val", "test"):
            raise UserError(f"the split is train, val or test; got {split!r}")
        self.root_folder = _existing(Path(root_folder))
        self.image_folder = _existing(self.root_folder / "images")
        self.label_file = Path(label_file or self.root_folder / f"{split}.txt")
        self.split = split
        self.num_classes = num_classes
        self.transforms = transforms
        self.paths, self.labels = read_label_file(self.label_file, num_classes)
        self.left_out: list[str] = []

    def skip(self, names: Iterable[str]) -> None:
        """Do without these images; `left_out` lists those that were there.

        Raises:
            UserError: none would be left.
        """
        bad = set(names)
        self.left_out = [path for path in self.paths if path in bad]
        kept = [pair for pair in zip(self.paths, self.labels, strict=True) if pair[0] not in bad]
        if not kept:
            raise UserError(f"no image that {self.label_file} lists can be read; {GET_DATA}")
        self.paths, self.labels = map(list, zip(*kept, strict=True))

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> np.ndarray:
        """One image, RGB uint8 (H, W, 3)."""
        return load_image(self.image_folder / self.paths[index])

    def __getitem__(self, index: int) -> tuple[torch.Tensor | np.ndarray, int]:
        image = self.read(index)
        if self.transforms is not None:
            image = self.transforms(image)
        return image, self.labels[index]

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Of what the transforms make, where they tell; `write` then takes memory for it."""
        return getattr(self.transforms, "shape", None)

    def write(self, index: int, out: np.ndarray) -> int:
        """Write the image to `out`, float32 of `image_shape`; returns the label."""
        self.transforms.write(self.read(index), out)
        return self.labels[index]

    def get_index_mapping(self) -> dict[str, str]:
        """Label id, as a string, to category name: {"0": "abbey", ...}.

        The name is what stands between letter and file in the training paths ("bakery/shop").
        """
        paths, labels = self.paths, self.labels
        if self.split != "train":
            paths, labels = read_label_file(self.root_folder / "train.txt", self.num_classes)
        names = {n: "/".join(p.split("/")[2:-1]) for p, n in zip(paths, labels, strict=True)}
        return {str(label): names[label] or str(label) for label in sorted(names)}


def count_classes(root_folder: str | Path) -> int:
    """One more than the largest label in train.txt, and in val.txt where there is one.

    Raises:
        UserError: train.txt is missing, or a line of either file is wrong.
    """
    root = _existing(Path(root_folder))
    files = [root / "train.txt", *(f for f in [root / "val.txt"] if os.path.exists(f))]
    return 1 + max(label for f in files for label in read_label_file(f, MAX_CLASSES)[1])


def read_label_file(path: Path, num_classes: int) -> tuple[list[str], list[int]]:
    """The image paths and the labels of a file with one `path label` per line.

    Byte-order mark, CRLF and blank lines are accepted.

    Raises:
        UserError: names the file and the line that is not UTF-8, not `path label`, out of range,
            outside the image folder, or there twice.
    """
    lines_of: dict[str, int] = {}
    labels = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        image, label = _parse_line(line, num_classes, where := f"{path}, line {number}")
        if lines_of.setdefault(image, number) != number:
            raise UserError(f"{where}: {image} is listed already, in line {lines_of[image]}")
        labels.append(label)
    if not labels:
        raise UserError(f"{path} lists no images; {GET_DATA}")
    return list(lines_of), labels


def _lines(path: Path) -> Iterator[str]:
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise UserError(f"there is no label file {path}; {GET_DATA}") from None
    except OSError as e:
        raise UserError(f"cannot read the label file {path}: {e.strerror or e}") from None
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            yield line.removesuffix(b"\r").decode()
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: this is not UTF-8 text") from None


def _parse_line(line: str, num_classes: int, where: str) -> tuple[str, int]:
    fields = line.strip(" \t").rsplit(maxsplit=1)
    # int() alone would accept 1_0, +1 and other scripts' digits, and reject over-long ones
    if len(fields) != 2 or not (fields[1].isascii() and fields[1].isdigit()):
        raise UserError(f"{where}: expected 'path label', got {_shorten(line)}")
    image, label = fields
    if len(label) > 9 or int(label) >= num_classes:
        raise UserError(f"{where}: label {label[:20]} is not in 0..{num_classes - 1}")
    if not _stays_inside(image):
        raise UserError(f"{where}: {_shorten(image)} is not a plain path below the image folder")
    return image, int(label)


def _stays_inside(path: str) -> bool:
    """Relative, forward slashes, no drive, no step up or in place: one spelling for each file."""
    parts = path.split("/")
    return path.isprintable() and not (
        "\\" in path or ":" in parts[0] or any(p in ("", ".", "..") for p in parts)
    )


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _existing(folder: Path) -> Path:
    if not os.path.isdir(folder):  # False, too, for what one may not look at
        raise UserError(f"there is no folder {folder}; {GET_DATA}")
    return folder
