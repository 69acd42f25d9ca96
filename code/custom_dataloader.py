"""The MiniPlaces data set.

root/images/train/<letter>/<category>/NNNNNNNN.jpg      root/train.txt   "path label" per line,
root/images/val/NNNNNNNN.jpg                            root/val.txt     path below images/
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from utils import UserError, load_image, relpath

# Images are spread over processes. OpenCV's own threads would compete for the same cores, and a
# forked worker that inherits its thread pool can hang.
cv2.setNumThreads(0)

MAX_CLASSES = 10_000  # a mangled label must not become the size of a layer
BLANK = b" \t\r\n"
CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")

CODE = Path(__file__).resolve().parent
DOWNLOAD = f"sh {relpath(CODE.parent / 'download_dataset.sh')}"  # where the user stands
GET_DATA = f"{DOWNLOAD} downloads MiniPlaces"
if (CODE / "make_sample_data.py").exists():  # not in the course's tree
    GET_DATA += f", python {relpath(CODE / 'make_sample_data.py')} draws a small set"


class MiniPlacesLoader(Dataset):
    """Images and labels of one split.

    `paths` (relative to `root_folder`/images) and `labels` are in the order of the label file.

    Args:
        label_file: `root_folder`/`split`.txt by default.
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
        self.skipped: list[str] = []

    def skip(self, names: Iterable[str]) -> None:
        """Remove these images from the set; `skipped` lists those that it had.

        Raises:
            UserError: no image remains.
        """
        bad = set(names)
        self.skipped = [path for path in self.paths if path in bad]
        kept = [pair for pair in zip(self.paths, self.labels, strict=True) if pair[0] not in bad]
        if not kept:
            raise UserError(f"no image that {self.label_file} lists can be read")
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
    def image_shape(self) -> tuple[int, ...] | None:
        """The shape of what the transforms `write` into given memory, if they can."""
        return getattr(self.transforms, "shape", None)

    def write(self, indices: Sequence[int], out: np.ndarray, u: np.ndarray) -> list[int]:
        """Write n transformed images to `out` (n, *image_shape); return the labels.

        `transforms.finish` makes the batch of them, `transforms.dtype` is the type of `out`.
        u: uniform numbers in [0, 1), (n, `transforms.draws`), that make the augmentation.
        """
        self.transforms.write(map(self.read, indices), out, u)
        return [self.labels[index] for index in indices]

    def get_index_mapping(self) -> dict[str, str]:
        """Label id, as a string, to category name: {"0": "abbey", ...}.

        The name is the part of a training path between letter and file ("bakery/shop").
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
    _existing(root / "images")
    files = [root / "train.txt", *(f for f in [root / "val.txt"] if os.path.exists(f))]
    return 1 + max(label for f in files for label in read_label_file(f, MAX_CLASSES)[1])


def read_label_file(path: Path, num_classes: int) -> tuple[list[str], list[int]]:
    """The image paths and the labels of a file with one `path label` per line.

    Byte-order mark, CRLF and blank lines are accepted. A file that was read before is not parsed
    again.

    Raises:
        UserError: names the file and the line that is not UTF-8, not `path label`, out of range,
            outside the image folder, or a repetition.
    """
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):  # reading it would never end
            raise UserError(f"the label file {path} is a pipe")
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise UserError(f"there is no label file {path}; {DOWNLOAD} downloads it") from None
    except OSError as e:
        raise UserError(f"cannot read the label file {path}: {e.strerror or e}") from None
    try:
        paths, labels = _parse(data)
        if max(labels, default=0) >= num_classes:
            image, label = next(
                row for row in zip(paths, labels, strict=True) if row[1] >= num_classes
            )
            raise UserError(f"line {_line_of(image, data)}: {_out_of_range(label, num_classes)}")
    except UserError as e:
        raise UserError(f"{path}, {e}") from None
    if not labels:
        raise UserError(f"{path} lists no images; {DOWNLOAD} downloads the official list")
    return list(paths), list(labels)


@lru_cache(maxsize=2)  # train.txt and val.txt, of up to a million lines
def _parse(data: bytes) -> tuple[tuple[str, ...], tuple[int, ...]]:
    line_of: dict[str, int] = {}
    labels = []
    for number, line in enumerate(io.BytesIO(data), 1):
        if not (fields := line.strip(BLANK).rsplit(maxsplit=1)):
            continue
        try:
            image, label = _parse_row(fields, line)
        except UnicodeDecodeError:
            raise UserError(f"line {number}: this is not UTF-8 text") from None
        except UserError as e:
            raise UserError(f"line {number}: {e}") from None
        if line_of.setdefault(image, number) != number:
            text = f"{_shorten(image)} is listed already, in line {line_of[image]}"
            raise UserError(f"line {number}: {text}")
        labels.append(label)
    return tuple(line_of), tuple(labels)


def _parse_row(fields: list[bytes], line: bytes) -> tuple[str, int]:
    # int() alone would accept 1_0, +1 and other scripts' digits, and reject over-long ones
    if len(fields) != 2 or not fields[1].isdigit():
        text = line.decode().rstrip("\r\n")
        raise UserError(f"expected 'path label', got {_shorten(text)}")
    image, label = fields[0].decode(), fields[1].decode()
    if len(label) > 9 or int(label) >= MAX_CLASSES:
        raise UserError(_out_of_range(label[:20], MAX_CLASSES))
    if not _stays_inside(image):
        raise UserError(f"{_shorten(image)} is not a plain path below the image folder")
    return image, int(label)


def _out_of_range(label: str | int, num_classes: int) -> str:
    return f"label {label} is not in 0..{num_classes - 1}"


def _line_of(image: str, data: bytes) -> int:
    lines = (line.strip(BLANK).rsplit(maxsplit=1)[:1] for line in io.BytesIO(data))
    return 1 + list(lines).index([image.encode()])


def _stays_inside(path: str) -> bool:
    """Relative, forward slashes, no drive, no step up or in place: one spelling for each file.

    Any character but a control character may be part of a name.
    """
    parts = path.split("/")
    return (
        {"", ".", ".."}.isdisjoint(parts)
        and "\\" not in path
        and ":" not in parts[0]
        and (path.isprintable() or not CONTROL.search(path))
    )


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _existing(folder: Path) -> Path:
    if not os.path.isdir(folder):  # False also where permission is denied
        raise UserError(f"there is no folder {folder}; {GET_DATA}")
    return folder
