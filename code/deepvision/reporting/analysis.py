"""Analyse a run's network: parameters, FLOPs, predictions on the validation images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from custom_dataloader import MiniPlacesLoader, count_classes
from deepvision import checkpoint
from deepvision.data.loader import validation_batches
from deepvision.models import student
from deepvision.reporting.records import Run
from utils import UserError, relpath

INPUT_SHAPE = (1, 3, 128, 128)


def count_parameters(model: nn.Module) -> int:
    """The number of scalars in all parameters."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def count_flops(model: nn.Module) -> int:
    """Floating-point operations of the forward pass of one image; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(INPUT_SHAPE))
    return counter.get_total_flops()


@dataclass
class Predictions:
    """Labels, predictions and their probabilities, each (N,), for N images of K classes."""

    labels: np.ndarray
    predictions: np.ndarray
    confidence: np.ndarray
    names: list[str]  # of the K classes

    @cached_property
    def confusion(self) -> np.ndarray:
        """(K, K): the number of images of true class i (row) that are predicted as j (column)."""
        counts = np.zeros((len(self.names),) * 2, int)
        np.add.at(counts, (self.labels, self.predictions), 1)
        return counts

    @property
    def present(self) -> np.ndarray:
        """The classes that have images, ascending."""
        return np.flatnonzero(self.confusion.sum(1))

    @property
    def class_accuracy(self) -> np.ndarray:
        """(K,) in per cent; nan for a class without images."""
        with np.errstate(invalid="ignore"):
            return 100 * self.confusion.diagonal() / self.confusion.sum(1)

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in per cent."""
        return 100 * float((self.labels == self.predictions).mean())

    def most_confused(self, n: int) -> list[tuple[int, int, int]]:
        """Up to n most frequent errors as (true class, predicted class, images)."""
        errors = self.confusion.copy()
        np.fill_diagonal(errors, 0)
        order = np.argsort(-errors, axis=None, kind="stable")[:n]
        pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
        return [(int(i), int(j), int(errors[i, j])) for i, j in pairs if errors[i, j]]

    def confused_block(self, n: int) -> list[int]:
        """Up to n classes, ascending, that the most frequent errors are among."""
        block: set[int] = set()
        for i, j, _ in self.most_confused(len(self.names) ** 2):
            if len(block | {i, j}) <= n:
                block |= {i, j}
            if len(block) == n:
                break
        return sorted(block)

    def examples(self, label: int, prediction: int, n: int) -> np.ndarray:
        """The indices of up to n images of this error, the most confident first."""
        of_pair = np.flatnonzero((self.labels == label) & (self.predictions == prediction))
        return of_pair[np.argsort(-self.confidence[of_pair], kind="stable")][:n]

    def recognised(self, n: int) -> list[int]:
        """The first correctly classified image of each of up to n classes."""
        right = np.flatnonzero(self.labels == self.predictions)
        _, first = np.unique(self.labels[right], return_index=True)
        return sorted(right[first].tolist())[:n]


class ValidationImages:
    """The validation images of a data folder, transformed as for validation.

    Raises:
        UserError: the folder is missing or broken.
    """

    def __init__(self, folder: Path, workers: int, skipped: Sequence[str] = ()) -> None:
        classes = count_classes(folder)
        transform = student.val_transforms()
        self.dataset = MiniPlacesLoader(folder, None, classes, "val", transform)
        self.dataset.skip(skipped)
        self.workers = workers
        mapping = self.dataset.get_index_mapping()
        self.names = [class_name(mapping.get(str(k), str(k))) for k in range(classes)]

    def images(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Normalised images (n, 3, H, W) and their labels (n,)."""
        pairs = [self.dataset[int(i)] for i in indices]
        return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])

    @torch.inference_mode()
    def predict(self, model: nn.Module, title: str) -> Predictions:
        """Classify all images.

        Raises:
            UserError: the network has another number of classes.
        """
        batches = validation_batches(self.dataset, self.workers)
        columns = []
        for x, y in tqdm(batches, desc=title, leave=False, disable=None):
            logits = model(x)
            if logits.shape[1] != len(self.names):
                raise UserError(
                    f"{self.dataset.root_folder} has {len(self.names)} classes and the network of "
                    f"{title} {logits.shape[1]}: name the run's data folder with --data"
                )
            confidence, prediction = logits.softmax(1).max(1)
            columns.append((y, prediction, confidence))
        return Predictions(*(torch.cat(c).numpy() for c in zip(*columns, strict=True)), self.names)


@dataclass
class RunAnalysis:
    """A run, the validation images of its data, and its network's predictions on them."""

    run: Run
    images: ValidationImages
    predictions: Predictions

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, 3, H, W)."""
        return self.run.network(x)


def analyse(run: Run, data: Path | None, workers: int) -> RunAnalysis:
    """Classify the validation images of a run's data folder, or of `data`.

    Raises:
        UserError: the network or the images are missing, or they do not fit each other.
    """
    folder = data or run.data_folder()
    if folder is None:
        raise UserError("the run recorded no data folder: name it with --data")
    if not folder.is_dir():
        raise UserError(f"there is no data folder {relpath(folder)}: name it with --data")
    network = run.network
    skipped = checkpoint.skipped_images(run.config) or []
    images = ValidationImages(Path(relpath(folder)), workers, skipped)
    return RunAnalysis(run, images, images.predict(network, run.label))


def class_name(path: str) -> str:
    """'swimming pool, outdoor' for the category folder swimming_pool/outdoor."""
    return path.replace("/", ", ").replace("_", " ")
