"""The networks of a run: create one, recognise one by its weights, load one from a checkpoint."""

from __future__ import annotations

import contextlib
import io
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from deepvision import checkpoint
from deepvision.models import student
from deepvision.models.scene_net import SceneNet, Shape
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
        hidden = io.StringIO()  # torch's line "Downloading:" would precede ours
        with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
            return weights.get_state_dict(check_hash=True)
    except Exception as e:  # the network, the disk and the file each fail in their own way
        raise UserError(
            f"no ImageNet weights for ResNet-18 ({str(e).splitlines()[0]}): "
            f"download {weights.url} and put it at {file}"
        ) from None


# By the kind that names a run folder
MODEL_REGISTRY = {
    "torch_conv": student.default_cnn,
    "custom_conv": partial(student.default_cnn, custom_conv=True),
    "vit": student.default_vit,
    "resnet18": resnet18,
    "scene_net": SceneNet,
}
NETWORK_NAMES = {
    "torch_conv": "SimpleNet",
    "custom_conv": "SimpleNet on CustomConv2d",
    "vit": "SimpleViT",
    "resnet18": "ResNet-18",
    "scene_net": "SceneNet",
}


def create_model(
    kind: str, num_classes: int, pretrained: bool = False, shape: Shape | None = None
) -> nn.Module:
    """Create a network; `pretrained` applies to resnet18 only, `shape` to scene_net only."""
    options = {}
    if pretrained and kind == "resnet18":
        options = {"pretrained": True}
    elif shape and kind == "scene_net":
        options = {"shape": shape}
    return MODEL_REGISTRY[kind](num_classes, **options)


def infer_arch(state_dict: dict[str, Tensor], num_classes: int, shape: Shape | None = None) -> str:
    """The kind of network whose weights these are, by keys and shapes.

    Where none fits, the one with the fewest mismatches, so that loading can report them.
    torch_conv and custom_conv have the same weights; the result is torch_conv.
    """
    mismatches = {}
    for kind in MODEL_REGISTRY:
        model = create_model(kind, num_classes, shape=shape)
        mismatches[kind] = len(checkpoint.state_dict_mismatch(model, state_dict))
        if not mismatches[kind]:  # do not build the others: a student may not have written them
            return kind
    return min(mismatches, key=mismatches.get)


def count_outputs(state_dict: dict[str, Tensor]) -> int:
    """The number of classes: the rows of the last matrix, which is the last linear layer's.

    Raises:
        UserError: there is no matrix, so the weights are no classifier's.
    """
    matrices = [v for v in state_dict.values() if v.dim() == 2]
    if not matrices:
        raise UserError("the checkpoint has no linear layer, so it is no classifier")
    return len(matrices[-1])


def load_network(
    ckpt: dict, path: str | Path, num_classes: int | None = None, kind: str | None = None
) -> tuple[nn.Module, str]:
    """A checkpoint's network with its weights, and its kind.

    kind: that of the caller; by default the one in the file, else the one its weights fit.

    Raises:
        UserError: the weights are another network's, of another number of classes, or of a network
            that this code does not know.
    """
    num_classes = num_classes or count_outputs(ckpt["state_dict"])
    kind, shape = kind or ckpt.get("kind"), None
    if ckpt.get("shape") is not None:
        with checkpoint.validated("shape"):
            shape = Shape.load(ckpt["shape"])
    if not isinstance(kind, str) or kind not in MODEL_REGISTRY:
        kind = infer_arch(ckpt["state_dict"], num_classes, shape)
    model = create_model(kind, num_classes, shape=shape)
    if checkpoint.state_dict_mismatch(model, ckpt["state_dict"]):
        raise UserError(f"{path} {explain_mismatch(ckpt['state_dict'], kind, num_classes, shape)}")
    checkpoint.load_weights(model, ckpt, path)
    return model, kind


def explain_mismatch(
    state_dict: dict[str, Tensor], kind: str, num_classes: int, shape: Shape | None
) -> str:
    """What these weights are, if not those of this kind of network, and what to do."""
    outputs = count_outputs(state_dict)
    found = infer_arch(state_dict, outputs, shape)
    if checkpoint.state_dict_mismatch(create_model(found, outputs, shape=shape), state_dict):
        return (
            "holds a network that this code does not know (its first weight is "
            f"{next(iter(state_dict))}): put the student_code.py that trained it into code/"
        )
    if outputs != num_classes:
        return (
            f"holds {NETWORK_NAMES[found]} for {outputs} classes and the data folder has "
            f"{num_classes}: use the data that it was trained on"
        )
    return f"holds {NETWORK_NAMES[found]}, not {NETWORK_NAMES[kind]}: leave the network's flag out"
