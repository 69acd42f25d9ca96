"""The assignment's answer, student_code.py, as the rest of the package sees it.

The only module that imports student_code, which students replace by their own file.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

import student_code


def default_cnn(num_classes: int, custom_conv: bool = False) -> nn.Module:
    """SimpleNet, on nn.Conv2d or on CustomConv2d."""
    if custom_conv:
        return student_code.default_cnn_model(
            conv_op=student_code.CustomConv2d, num_classes=num_classes
        )
    return student_code.default_cnn_model(num_classes=num_classes)


def default_vit(num_classes: int) -> nn.Module:
    """SimpleViT."""
    return student_code.default_vit_model(num_classes=num_classes)


def train_transforms() -> Callable[[np.ndarray], Tensor]:
    """Augmentation: uint8 (H, W, 3) to a normalised tensor (3, 128, 128)."""
    return student_code.get_train_transforms()


def val_transforms() -> Callable[[np.ndarray], Tensor]:
    """Center crop: uint8 (H, W, 3) to a normalised tensor (3, 128, 128)."""
    return student_code.get_val_transforms()


def default_attack(loss_fn: nn.Module) -> object:
    """The assignment's attack; `perturb(model, input)` gives adversarial images."""
    return student_code.default_attack(loss_fn)


def image_grid(x: Tensor) -> Tensor:
    """A normalised batch (N, 3, H, W) as one image (3, H', W') in [0, 1]."""
    return student_code.default_visfunction(x)
