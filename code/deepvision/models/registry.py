"""The networks a run can train, by the kind that names its log folder."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor, nn

import student_code
from deepvision.checkpoint import state_dict_mismatch
from deepvision.models.scene_net import SceneNet
from utils import UserError


def resnet18(num_classes: int, pretrained: bool = False) -> nn.Module:
    """ResNet-18 (He et al., 2016) with a new last layer, on ImageNet weights if asked for.

    Raises:
        UserError: the weights are not on this machine and cannot be downloaded.
    """
    from torchvision.models import ResNet18_Weights
    from torchvision.models import resnet18 as torchvision_resnet18

    model = torchvision_resnet18()
    if pretrained:
        model.load_state_dict(_download(ResNet18_Weights.IMAGENET1K_V1))
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model


def _download(weights: object) -> dict[str, Tensor]:
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar would precede our line
            return weights.get_state_dict(check_hash=True)
    except Exception as e:  # the network, the disk and the file each fail in their own way
        raise UserError(
            f"no ImageNet weights for ResNet-18 ({str(e).splitlines()[0]}): "
            f"download {weights.url} and put it at {file}"
        ) from None


MODEL_REGISTRY = {
    "torch_conv": lambda n: student_code.default_cnn_model(num_classes=n),
    "custom_conv": lambda n: student_code.default_cnn_model(
        conv_op=student_code.CustomConv2d, num_classes=n
    ),
    "vit": lambda n: student_code.default_vit_model(num_classes=n),
    "resnet18": resnet18,
    "scene_net": lambda n: SceneNet(num_classes=n),
}


def create_model(kind: str, num_classes: int, pretrained: bool = False) -> nn.Module:
    """Make a network; `pretrained` has a meaning for resnet18 alone."""
    if kind == "resnet18":
        return resnet18(num_classes, pretrained)
    return MODEL_REGISTRY[kind](num_classes)


def infer_arch(state_dict: dict[str, Tensor], num_classes: int) -> str:
    """Tell the kind of network whose weights these are, by keys and shapes.

    Where none fits whole, the one with the fewest misfits is named, so that loading can say why.
    torch_conv and custom_conv have the same weights; the answer is torch_conv.
    """
    wrong = {}
    for kind in MODEL_REGISTRY:
        wrong[kind] = len(state_dict_mismatch(create_model(kind, num_classes), state_dict))
        if not wrong[kind]:  # the others stay unbuilt: a student may have yet to write them
            return kind
    return min(wrong, key=wrong.get)
