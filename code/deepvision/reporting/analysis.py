"""What a trained network does: its size, its arithmetic, its answers to the validation images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import student_code
from custom_dataloader import MiniPlacesLoader, count_classes
from deepvision.data.loader import validation_batches
from utils import UserError

IMAGE = (1, 3, 128, 128)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def count_flops(model: nn.Module) -> int:
    """Floating-point operations of one image's forward pass; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(IMAGE))
    return counter.get_total_flops()


@dataclass
class Predictions:
    """A network's answers to N images: labels, predictions (N,), their probabilities (N,)."""

    labels: np.ndarray
    predictions: np.ndarray
    confidence: np.ndarray
    names: list[str]  # of the K categories

    @property
    def confusion(self) -> np.ndarray:
        """(K, K): how many images of category i (row) were taken for category j (column)."""
        counts = np.zeros((len(self.names),) * 2, int)
        np.add.at(counts, (self.labels, self.predictions), 1)
        return counts

    @property
    def class_accuracy(self) -> np.ndarray:
        """(K,) in per cent, nan for a category without images."""
        counts = self.confusion
        with np.errstate(invalid="ignore"):
            return 100 * counts.diagonal() / counts.sum(1)

    def most_confused(self, n: int) -> list[tuple[int, int, int]]:
        """The n most frequent errors as (category, taken for, images), none that is not there."""
        errors = self.confusion
        np.fill_diagonal(errors, 0)
        order = np.argsort(-errors, axis=None, kind="stable")[:n]
        pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
        return [(int(i), int(j), int(errors[i, j])) for i, j in pairs if errors[i, j]]

    def examples(self, label: int, prediction: int, n: int) -> np.ndarray:
        """The indices of up to n images of this error, the most confident first."""
        of_pair = np.flatnonzero((self.labels == label) & (self.predictions == prediction))
        return of_pair[np.argsort(-self.confidence[of_pair], kind="stable")][:n]


class Validation:
    """The validation images of a data folder, as a network sees them.

    Raises:
        UserError: the folder is missing or broken.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        classes = count_classes(folder)
        transform = student_code.get_val_transforms()
        self.dataset = MiniPlacesLoader(folder, None, classes, "val", transform)
        self.workers = workers
        mapping = self.dataset.get_index_mapping()
        self.names = [
            category_name(mapping.get(str(label), str(label))) for label in range(classes)
        ]

    def skip(self, names: list[str]) -> None:
        self.dataset.skip(names)

    def images(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Normalised images (n, 3, H, W) and their labels (n,)."""
        pairs = [self.dataset[int(i)] for i in indices]
        return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])

    @torch.inference_mode()
    def ask(self, model: nn.Module, title: str) -> Predictions:
        """Raises UserError when the network knows another number of categories."""
        batches = validation_batches(self.dataset, self.workers)
        labels, predictions, confidence = [], [], []
        for x, y in tqdm(batches, desc=title, leave=False, disable=None):
            logits = model(x)
            if logits.shape[1] != len(self.names):
                raise UserError(
                    f"{self.dataset.root_folder} has {len(self.names)} categories and the network "
                    f"of {title} tells {logits.shape[1]} apart: name its own folder with --data"
                )
            p, k = logits.softmax(1).max(1)
            labels.append(y)
            predictions.append(k)
            confidence.append(p)
        columns = (torch.cat(c).numpy() for c in (labels, predictions, confidence))
        return Predictions(*columns, self.names)


def category_name(path: str) -> str:
    return path.replace("/", ", ").replace("_", " ")
