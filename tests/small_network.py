"""Networks small enough to train within a test."""

import torch
from torch import nn

from deepvision.models.scene_net import SceneNet, Shape


def make_network(seed: int = 0, dropout: float = 0) -> nn.Module:
    """For images (N, 3, 9, 9) of 7 classes; with batch statistics."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(32, 7),
    )


def narrow_scene_net(
    num_classes: int, width: int = 8, depths: tuple[int, ...] = (1, 1, 1), **options: object
) -> SceneNet:
    """A SceneNet of other widths than any recipe's; options: fields of its `Shape`."""
    widths = tuple(width * 2**stage for stage in range(len(depths)))
    return SceneNet(num_classes, Shape((width,), widths, depths, 4 * widths[-1], **options))
