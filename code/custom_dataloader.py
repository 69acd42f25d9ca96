"""The MiniPlaces data set, and loaders whose every sample follows from (seed, epoch, index).

    root/images/train/<letter>/<category>/NNNNNNNN.jpg      root/train.txt   "path label" per line,
    root/images/val/NNNNNNNN.jpg                            root/val.txt     path below images/

A resumed run must see the pictures it would have seen. So the order of an epoch is computed, not
drawn (`EpochBatches`), and each sample seeds the random numbers of its own augmentation
(`Reproducible`): neither the number of workers nor the batch at which a run was cut matters.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from utils import UserError, load_image

# Work is split by image, over processes. OpenCV's own threads would share the same cores, and a
# forked worker that inherits its thread pool can hang.
cv2.setNumThreads(0)

MAX_CLASSES = 10_000  # a mangled label must not become the size of a layer
VALIDATION_BATCH = 100

GET_DATA = "get the images with: sh download_dataset.sh"

Key = tuple[int, int]  # (epoch, index)
WHOLE = slice(0, None, 1)


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

    def leave_out(self, names: Iterable[str]) -> None:
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
    files = [root / "train.txt", *(f for f in [root / "val.txt"] if f.exists())]
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
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; {GET_DATA}")
    return folder


# ---------------------------------------------------------------------------------------------
# Reproducible batches
# ---------------------------------------------------------------------------------------------


class EpochBatches:
    """A batch sampler whose order follows from (seed, epoch); yields lists of (epoch, index).

    share: the part of each batch that is yielded; several processes take one each.
    The last partial batch is dropped. Call `set_position` before each epoch; the length is always
    that of a whole epoch.
    """

    def __init__(self, n: int, batch_size: int, seed: int, share: slice = WHOLE) -> None:
        self.n, self.batch_size, self.seed, self.share = n, batch_size, seed, share
        self.set_position(0)

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """The next iteration yields the batches of `epoch` from `start_batch` on."""
        self.epoch, self.start_batch = epoch, start_batch

    def indices(self, epoch: int, batch: int) -> list[int]:
        """The samples of one batch, to name them in a message."""
        start = batch * self.batch_size
        return self._order(epoch)[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        return self.n // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, size = self.epoch, self.batch_size
        order = self._order(epoch).tolist()
        for batch in range(self.start_batch, len(self)):
            whole = order[batch * size : (batch + 1) * size]
            yield [(epoch, index) for index in whole[self.share]]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.n)


class Reproducible(Dataset):
    """`dataset` under keys (epoch, index): each sample's random numbers follow from (seed, key).

    Python's, NumPy's and torch's generators are seeded before each sample, for the transforms of
    students, too, and put back after each batch, since without workers they are the trainer's own.

    A UserError is returned in the batch's place: raised in a worker, torch would wrap it in that
    worker's traceback. `Batches` raises it.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> list | UserError:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        try:
            return [self._sample(*key) for key in keys]
        except UserError as e:
            return e
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])

    def _sample(self, epoch: int, index: int):
        random.seed(f"{self.seed} {epoch} {index}")  # a string is hashed: neighbours differ
        np.random.seed(random.getrandbits(32))  # noqa: NPY002 - the generator students use
        # not torch.manual_seed, which would reseed the GPU as well
        torch.default_generator.manual_seed(random.getrandbits(63))
        return self.dataset[index]


class Batches(DataLoader):
    """A DataLoader over `Reproducible`: raises a worker's UserError as it was.

    A data set's `develop`, where it has one, makes the images of what the workers deliver.
    """

    def __init__(self, dataset: Dataset, batch_sampler, seed: int, workers: int, **options) -> None:
        super().__init__(
            Reproducible(dataset, seed),
            batch_sampler=batch_sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
            worker_init_fn=obey_the_trainer,
            # DataLoader draws a seed for each pass; from here, not from the trainer's numbers
            generator=torch.Generator(),
            **options,
        )
        self.develop = getattr(dataset, "develop", lambda images: images)

    def __iter__(self) -> Iterator:
        try:
            for batch in super().__iter__():
                if isinstance(batch, UserError):
                    raise batch
                yield self.develop(batch[0]), *batch[1:]
        except (ConnectionError, EOFError):  # a worker died while it handed over a batch
            raise UserError(DEAD_WORKER.format(NO_MEMORY)) from None


def obey_the_trainer(worker: int) -> None:
    """Ctrl-C and SIGTERM may reach every process of a group; the trainer decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # tells who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_told, daemon=True).start()


def _end_when_told() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


DEAD_WORKER = "a process that loads images died ({}): use fewer of them, -j 1 or -j 0"
NO_MEMORY = "memory may have run out, or /dev/shm is full"


def worker_death(error: RuntimeError) -> UserError | None:
    """What to tell of an error with which torch reports a dead worker, at any point of a run."""
    text = str(error)
    if "DataLoader worker" in text and "Caught" not in text:
        return UserError(DEAD_WORKER.format(NO_MEMORY))
    if "shared memory" in text or "No space left on device" in text:
        return UserError(DEAD_WORKER.format("/dev/shm is full"))
    return None


def _collate(samples: list | UserError):
    return samples if isinstance(samples, UserError) else default_collate(samples)


def training_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    workers: int,
    pin_memory: bool = False,
    share: slice = WHOLE,
) -> Batches:
    """Shuffled batches (N, C, H, W), (N,); `.batch_sampler.set_position(epoch, batch)` steers them.

    Raises:
        UserError: there are fewer images than one batch takes, or a batch has no equal shares.
    """
    if batch_size % share.step:
        raise UserError(f"-b {batch_size} does not divide among {share.step} processes")
    if len(dataset) < batch_size:
        raise UserError(
            f"{len(dataset)} training images do not fill one batch of {batch_size}; "
            f"use -b {len(dataset)} or less"
        )
    sampler = EpochBatches(len(dataset), batch_size, seed, share)
    return Batches(dataset, sampler, seed, workers, pin_memory=pin_memory)


def validation_batches(
    dataset: Dataset, workers: int, pin_memory: bool = False, share: slice = WHOLE
) -> Batches:
    """All images in order, in batches of 100; transforms that draw, draw the same every time."""
    keys = [(0, index) for index in range(len(dataset))]
    batches = [keys[i : i + VALIDATION_BATCH] for i in range(0, len(keys), VALIDATION_BATCH)]
    if len(batches[-1]) < share.step and len(batches) > 1:  # an image for each process
        batches[-2:] = [batches[-2] + batches[-1]]
    shares = [batch[share] for batch in batches]
    return Batches(dataset, shares, 0, workers, pin_memory=pin_memory)


def held_out_batch(dataset: Dataset, size: int) -> tuple[Tensor, Tensor]:
    """`size` images evenly spread over the set, or all, with their labels: (N, C, H, W), (N,).

    Raises:
        UserError: one of them cannot be read.
    """
    indices = np.linspace(0, len(dataset) - 1, min(size, len(dataset))).astype(int).tolist()
    images, labels = next(iter(Batches(dataset, [[(0, i) for i in indices]], 0, workers=0)))
    return images, labels
