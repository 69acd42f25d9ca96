"""Networks that runs of main.py trained, images to try them on, and figures with intervals."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))

from custom_dataloader import MiniPlacesLoader, count_classes  # noqa: E402
from deepvision import checkpoint  # noqa: E402
from deepvision.data.loader import fixed_subset_batch  # noqa: E402
from deepvision.evaluation.statistics import wilson  # noqa: E402
from deepvision.models import registry  # noqa: E402
from student_code import get_val_transforms  # noqa: E402


def best_network(run: Path, data: Path) -> tuple[str, nn.Module]:
    """A run's best network, in evaluation mode, and its name with the epochs it trained."""
    path = run / "models" / checkpoint.BEST
    content = checkpoint.load(path)
    model = registry.create_model(content["kind"], count_classes(data)).eval()
    checkpoint.load_weights(model, content, path)
    return f"{run.name}, epoch {content['epoch']}", model


def validation_images(data: Path, n: int) -> tuple[Tensor, Tensor]:
    classes = count_classes(data)
    val_set = MiniPlacesLoader(data, None, classes, "val", get_val_transforms())
    return fixed_subset_batch(val_set, n)


def interval(n: int) -> Callable[[float], str]:
    """Per cent of n -> '41.0 (34.4–47.9)', the 95 % interval behind it."""

    def text(percent: float) -> str:
        low, high = wilson(percent / 100 * n, n)
        return f"{percent:.1f} ({low:.1f}–{high:.1f})"

    return text
