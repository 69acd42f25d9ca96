"""-e --views: accuracy on larger views of the images, and averaged over several.

The random crops of training show a network scenes larger than the course's validation view does,
so that a larger test image fits it better (Touvron et al., 2019, "Fixing the train-test resolution
discrepancy").
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from custom_dataloader import MiniPlacesLoader
from custom_transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    Compose,
    Normalize,
    Scale,
    ToTensor,
)
from deepvision.data.loader import validation_batches
from deepvision.runtime import distributed
from deepvision.runtime.console import progress_bar
from deepvision.runtime.device import DeviceContext, check_size
from deepvision.runtime.meters import EpochMetrics, Metrics

COURSE = "course's view"
SIZES = (144, 160, 176, 192)  # of the whole image: 128 pixels x 9/8 to 12/8; not tuned on any data


def evaluate_views(
    model: nn.Module, val_set: MiniPlacesLoader, context: DeviceContext, workers: int
) -> Iterator[tuple[str, Metrics]]:
    """The accuracy of each view, and of the mean of their logits; all with mirror images.

    Raises:
        UserError: the network takes one size only, as with position embeddings.
    """
    model.eval()
    check_size(model, context, SIZES[0], "--views")
    total, views = None, {COURSE: val_set.transforms}
    views |= {f"whole image at {size}": whole_image(size) for size in SIZES}
    for name, transforms in views.items():
        dataset = copy.copy(val_set)
        dataset.transforms = transforms
        logits, labels = mirrored_logits(model, dataset, context, workers, name)
        total = logits if total is None else total + logits
        yield name, accuracy(logits, labels)
    yield f"mean of all {len(views)}", accuracy(total, labels)


def whole_image(size: int) -> Compose:
    """The whole image, its central square where it is none, at `size` x `size` pixels."""
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return Compose([Scale(size), CenterCrop(size), ToTensor(), normalize])


@torch.inference_mode()
def mirrored_logits(
    model: nn.Module,
    dataset: MiniPlacesLoader,
    context: DeviceContext,
    workers: int,
    title: str,
) -> tuple[Tensor, Tensor]:
    """Logits (N, K), the sum over each image and its mirror image, and labels (N,)."""
    parts = []
    batches = validation_batches(dataset, workers, context.device, distributed.rank_slice())
    with progress_bar(len(batches), title) as bar:
        for x, y in batches:
            x, y = context.to_device(x, y)
            parts.append((model(x) + model(x.flip(3)), y))
            bar.update()
    logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return logits, labels


def accuracy(logits: Tensor, labels: Tensor) -> Metrics:
    """Metrics of logits (N, K), over all processes."""
    metrics = EpochMetrics(logits.device)
    metrics.update(logits, labels)
    return metrics.compute()[1]
