"""Read every image of a data folder once: --check-data tells, --skip-bad-images leaves out."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from custom_dataloader import MAX_CLASSES, MiniPlacesLoader
from deepvision.data.loader import worker_init
from deepvision.runtime.console import progress_bar
from utils import UserError, load_image

SHOWN = 20  # problems told one by one


def check(root: str | Path, workers: int) -> int:
    """Print the classes and all problems of a data folder; the exit code, 1 if there are any."""
    sets, problems = {}, []
    for split in ("train", "val"):
        try:
            sets[split] = MiniPlacesLoader(root, None, MAX_CLASSES, split)
        except UserError as e:
            problems.append(str(e))
    print(table_of_classes(sets))
    problems += classes_without_images(sets)
    split_of: dict[str, tuple[str, str]] = {}  # digest: (split, first image with that content)
    for split, dataset in sets.items():
        for name, problem, digest in iter_checked(dataset, workers):
            there, twin = split_of.setdefault(digest, (split, name))
            if problem:
                problems.append(problem)
            elif there != split:
                problems.append(f"{name} of {split}.txt shows the same as {twin} of {there}.txt")
    for line in problems[:SHOWN]:
        print(f"problem: {line}")
    if len(problems) > SHOWN:
        print(f"... and {len(problems) - SHOWN} more")
    print(f"{len(problems)} problems" if problems else "No problems found.")
    return 1 if problems else 0


def table_of_classes(sets: dict[str, MiniPlacesLoader]) -> str:
    names = sets["train"].get_index_mapping() if "train" in sets else {}
    counts = {split: Counter(dataset.labels) for split, dataset in sets.items()}
    lines = ["class" + "".join(f"{split:>8}" for split in sets) + "  name"]
    for label in sorted(set().union(*counts.values())):
        numbers = "".join(f"{counts[split][label]:8}" for split in sets)
        lines.append(f"{label:5}{numbers}  {names.get(str(label), '')}")
    return "\n".join([*lines, "total" + "".join(f"{len(s):8}" for s in sets.values())])


def classes_without_images(sets: dict[str, MiniPlacesLoader]) -> list[str]:
    labels = {split: set(dataset.labels) for split, dataset in sets.items()}
    every = range(1 + max(set().union(*labels.values()), default=-1))
    return [
        f"class {label} has no images in {split}.txt"
        for split in sets
        for label in every
        if label not in labels[split]
    ]


def unreadable(datasets: list[MiniPlacesLoader], workers: int) -> list[str]:
    """The names of all images that a run should do without."""
    return [name for d in datasets for name, problem, _ in iter_checked(d, workers) if problem]


def iter_checked(dataset: MiniPlacesLoader, workers: int) -> Iterator[tuple[str, str, str]]:
    """(name, problem or '', digest of the pixels) of each image, in the order of the labels."""
    loader = DataLoader(
        Inspection(dataset),
        batch_size=32,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=worker_init,
    )
    with progress_bar(len(dataset), dataset.split) as bar:
        for batch in loader:
            bar.update(len(batch))
            yield from batch


class Inspection(Dataset):
    """The findings about a data set's images, in place of the images."""

    def __init__(self, dataset: MiniPlacesLoader) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[str, str, str]:
        name = self.dataset.paths[index]
        path = self.dataset.image_folder / name
        try:
            with decoders_complaints() as complaints:
                image = load_image(path)
        except UserError as e:
            return name, str(e), name
        if complaints:
            return name, f"the image {path} is damaged: {complaints[0]}", name
        return name, "", hashlib.blake2b(image.tobytes() + repr(image.shape).encode()).hexdigest()


@contextlib.contextmanager
def decoders_complaints() -> Iterator[list[str]]:
    """Collect what libraries in C print: the JPEG decoder goes on after damage and only says so."""
    lines: list[str] = []
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
