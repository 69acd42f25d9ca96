"""The assignment's answer, student_code.py, as the rest of the package sees it.

The only module that imports student_code, which students replace by their own file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

import student_code
from custom_transforms import IMAGENET_MEAN, IMAGENET_STD, Normalize


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
    return _transforms(student_code.get_train_transforms)


def val_transforms() -> Callable[[np.ndarray], Tensor]:
    """Center crop: uint8 (H, W, 3) to a normalised tensor (3, 128, 128)."""
    return _transforms(student_code.get_val_transforms)


def _transforms(factory: Callable) -> Callable[[np.ndarray], Tensor]:
    """The editions 2022 and 2023 of the assignment pass the Normalize transform."""
    parameters = inspect.signature(factory).parameters.values()
    if any(parameter.default is parameter.empty for parameter in parameters):
        return factory(Normalize(IMAGENET_MEAN, IMAGENET_STD))
    return factory()


def default_attack(loss_fn: nn.Module) -> object:
    """The assignment's attack; `perturb(model, input)` gives adversarial images."""
    return student_code.default_attack(loss_fn)


def image_grid(x: Tensor) -> Tensor:
    """A normalised batch (N, 3, H, W) as one image (3, H', W') in [0, 1]."""
    return student_code.default_visfunction(x)


def attention_grid(model: nn.Module, x: Tensor) -> Tensor | None:
    """The same with the answer's saliency maps (editions 2022 and 2023); None where it has none."""
    explainer = getattr(student_code, "default_attention", None)
    draws_maps = "vis_output" in inspect.signature(student_code.default_visfunction).parameters
    if explainer is None or not draws_maps:
        return None
    maps = explainer(nn.CrossEntropyLoss()).explain(model, x.clone())  # (N, 1, H, W)
    return student_code.default_visfunction(x, vis_output=maps)
