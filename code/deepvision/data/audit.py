"""Read every image of a data folder once, for --check-data and --skip-bad-images."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import Dataset

from custom_dataloader import MAX_CLASSES, MiniPlacesLoader
from deepvision.data.loader import validation_batches
from deepvision.runtime.console import progress_bar
from utils import DamagedImageWarning, UserError, load_image

SHOWN = 20  # problems printed one by one


def check(root: str | Path, workers: int) -> int:
    """Print the classes and the problems of a data folder; the exit code is 1 for any problem."""
    sets, problems = {}, []
    for split in ("train", "val"):
        try:
            sets[split] = MiniPlacesLoader(root, None, MAX_CLASSES, split)
        except UserError as e:
            problems.append(str(e))
    print(class_table(sets))
    problems += classes_without_images(sets)
    split_of: dict[str, tuple[str, str]] = {}  # digest: (split, first image with that content)
    for split, dataset in sets.items():
        for name, problem, digest in iter_checked(dataset, workers):
            other, twin = split_of.setdefault(digest, (split, name))
            if problem:
                problems.append(problem)
            elif other != split:
                problems.append(f"{name} of {split}.txt shows the same as {twin} of {other}.txt")
    for line in problems[:SHOWN]:
        print(f"problem: {line}")
    if len(problems) > SHOWN:
        print(f"... and {len(problems) - SHOWN} more")
    n = len(problems)
    print(f"{n} problem{'s' * (n > 1)}" if problems else "No problems found.")
    return 1 if problems else 0


def class_table(sets: dict[str, MiniPlacesLoader]) -> str:
    """One line per label: the number of images in each split, the class name."""
    names = sets["train"].get_index_mapping() if "train" in sets else {}
    counts = {split: Counter(dataset.labels) for split, dataset in sets.items()}
    lines = ["class" + "".join(f"{split:>8}" for split in sets) + "  name"]
    for label in sorted(set().union(*counts.values())):
        numbers = "".join(f"{counts[split][label]:8}" for split in sets)
        lines.append(f"{label:5}{numbers}  {names.get(str(label), '')}")
    return "\n".join([*lines, "total" + "".join(f"{len(s):8}" for s in sets.values())])


def classes_without_images(sets: dict[str, MiniPlacesLoader]) -> list[str]:
    """A line per class and split that has no image, for labels up to the largest."""
    labels = {split: set(dataset.labels) for split, dataset in sets.items()}
    every = range(1 + max(set().union(*labels.values()), default=-1))
    return [
        f"class {label} has no images in {split}.txt"
        for split in sets
        for label in every
        if label not in labels[split]
    ]


def unreadable(datasets: list[MiniPlacesLoader], workers: int) -> list[str]:
    """The names of the images that --skip-bad-images leaves out: unreadable or damaged."""
    return [name for d in datasets for name, problem, _ in iter_checked(d, workers) if problem]


def iter_checked(dataset: MiniPlacesLoader, workers: int) -> Iterator[tuple[str, str, str]]:
    """(name, problem or "", digest of the pixels) of each image, in the order of the labels."""
    with progress_bar(len(dataset), dataset.split) as bar:
        for names, problems, digests in validation_batches(Inspection(dataset), workers):
            bar.update(len(names))
            yield from zip(names, problems, digests, strict=True)


class Inspection(Dataset):
    """(name, problem or "", digest of the pixels) in place of each image of a data set."""

    def __init__(self, dataset: MiniPlacesLoader) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[str, str, str]:
        name = self.dataset.paths[index]
        with warnings.catch_warnings():
            warnings.simplefilter("error", DamagedImageWarning)
            try:
                image = load_image(self.dataset.image_folder / name)
            except (UserError, DamagedImageWarning) as e:
                return name, str(e), name
        digest = hashlib.blake2b(image.tobytes() + repr(image.shape).encode())
        return name, "", digest.hexdigest()
