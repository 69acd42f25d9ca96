"""Classifiers of images in [0, 1] with access to their features, and how to find a trained one."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from custom_transforms import IMAGENET_MEAN, IMAGENET_STD
from deepvision import checkpoint
from deepvision.models import registry
from deepvision.runtime.run_dir import run_dirs
from reverse_attack import resnets
from utils import UserError, relpath

UNUSED = "sub_block1."  # a block that the public checkpoint holds and its network never runs


class Classifier(nn.Module):
    """A network behind a layer that normalises images in [0, 1] with its mean and std.

    Its features are the input of the network's last linear layer.
    bf16: the network computes in bfloat16 where torch's autocast does; logits are float32.
    """

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        bf16: bool = False,
    ):
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)
        self.bf16 = bf16
        for name, values in (("mean", mean), ("std", std)):
            column = torch.tensor(values).view(1, 3, 1, 1)
            self.register_buffer(name, column, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] to logits (N, K)."""
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.net(x)
        return logits.float()

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, D) and logits (N, K) of one forward pass."""
        features = []
        hook = self.last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        try:
            logits = self(x)
        finally:
            hook.remove()
        return features[0].float(), logits

    def features(self, x: Tensor) -> Tensor:
        """Features (N, D) of images (N, 3, H, W)."""
        return self.features_and_logits(x)[0]

    @property
    def last(self) -> nn.Linear:
        """The network's last linear layer."""
        return [module for module in self.net.modules() if isinstance(module, nn.Linear)][-1]


@dataclass
class LoadedClassifier:
    """A classifier with its checkpoint's path and SHA-256, and the name of its network."""

    model: Classifier
    path: Path
    sha256: str
    arch: str


def run_kind(task: str, dataset: str, arch: str) -> str:
    """The part of a run folder's name before `_exp_`."""
    return f"{dataset}_{task.lower()}_{arch}"


def best_checkpoints(logs: Path, kind: str) -> list[Path]:
    """The best checkpoints of all runs of this kind, the newest run first."""
    paths = (run / "models" / checkpoint.BEST for run in run_dirs(logs, [kind]))
    return [path for path in paths if path.is_file()]


def find(weights: str | None, logs: Path, dataset: str, arch: str) -> Path:
    """The file `weights`, else that of the newest robust run, else of the newest plain one.

    Raises:
        UserError: there is none.
    """
    if weights:
        return Path(weights)
    for task in ("Robust", "Clean"):
        if paths := best_checkpoints(logs, run_kind(task, dataset, arch)):
            return paths[0]
    raise UserError(
        f"no {arch} classifier for {dataset} yet: train one with "
        "reverse_attack/train.py --task Robust, or name a file with --weights"
    )


def from_args(args: Namespace, num_classes: int) -> LoadedClassifier:
    """The classifier of the command line, in evaluation mode on its device."""
    path = find(args.weights, args.logs, args.dataset, args.arch)
    loaded = load(path, args.arch, num_classes, args.bf16)
    loaded.model.to(args.device)
    print(f"Classifier: {relpath(path)}", flush=True)
    return loaded


def load(path: Path, arch: str, num_classes: int, bf16: bool = False) -> LoadedClassifier:
    """A trained classifier: from train.py, from main.py, or a public checkpoint.

    arch: the network of a file that does not name one of main.py's.

    Raises:
        UserError: the file is missing or damaged, or does not fit `arch` or the number of classes.
    """
    ckpt = checkpoint.load(path)
    if main_arch := main_network(ckpt, num_classes):
        net, arch = registry.load_network(ckpt, path, num_classes, main_arch)
        model = Classifier(net, IMAGENET_MEAN, IMAGENET_STD, bf16)
    else:
        model = Classifier(net := resnets.build(arch, num_classes), bf16=bf16)
        weights = ckpt["state_dict"].items()
        ckpt["state_dict"] = {k: v for k, v in weights if not k.startswith(UNUSED)}
        checkpoint.load_weights(net, ckpt, path)
    return LoadedClassifier(model.eval(), path, sha256(path), arch)


def main_network(ckpt: dict, num_classes: int) -> str | None:
    """The name of main.py's network that a checkpoint holds; None for any other network."""
    kind = ckpt.get("kind")
    if isinstance(kind, str):
        return kind if kind in registry.MODEL_REGISTRY else None
    if "task" in ckpt:  # written by train.py
        return None
    kind = registry.infer_arch(ckpt["state_dict"], num_classes)
    model = registry.create_model(kind, num_classes)
    return None if checkpoint.state_dict_mismatch(model, ckpt["state_dict"]) else kind


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
