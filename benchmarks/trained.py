"""Networks trained by main.py, validation images, and accuracies with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import results_file  # noqa: F401 - makes code/ importable
from torch import Tensor, nn

from custom_dataloader import MiniPlacesLoader, count_classes
from deepvision import checkpoint
from deepvision.data.loader import fixed_subset_batch
from deepvision.evaluation.statistics import wilson
from deepvision.models import registry, student


def best_network(run: Path, data: Path) -> tuple[str, nn.Module]:
    """The best network of a run in evaluation mode, and its name with the epochs done.

    Raises:
        UserError: the run has no valid model_best.pth.tar, or it has another number of classes.
    """
    path = checkpoint.locate(run, checkpoint.BEST)
    ckpt = checkpoint.load(path)
    model, _ = registry.load_network(ckpt, path, count_classes(data))
    return f"{run.name}, epoch {ckpt['epoch']}", model.eval()


def validation_images(data: Path, n: int) -> tuple[Tensor, Tensor]:
    """At most n evenly spaced validation images (n, 3, 128, 128), normalised, and labels (n,)."""
    val_set = MiniPlacesLoader(data, None, count_classes(data), "val", student.val_transforms())
    return fixed_subset_batch(val_set, n)


def confidence_interval(n: int) -> Callable[[float], str]:
    """A function from per cent of n to text with the 95 % interval: `41.0 (34.4–47.9)`."""

    def text(percent: float) -> str:
        low, high = wilson(percent / 100 * n, n)
        return f"{percent:.1f} ({low:.1f}–{high:.1f})"

    return text
