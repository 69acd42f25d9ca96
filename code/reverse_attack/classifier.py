"""Classifiers of pixels in [0, 1] that tell their features too, and where to find a trained one."""

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
from deepvision.runtime import run_logger
from reverse_attack import resnets
from utils import UserError, relpath

UNUSED = "sub_block1."  # a block that the public checkpoint holds and its network never runs


class Classifier(nn.Module):
    """A network behind a layer that brings pixels in [0, 1] to its mean and std.

    Its features are what its last linear layer is given, whatever the network.
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
        """Pixels `(N, 3, H, W)` to logits `(N, K)`."""
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.net(x)
        return logits.float()

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(N, D)` and logits `(N, K)` of one forward pass."""
        seen = []
        hook = self.last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self(x)
        finally:
            hook.remove()
        return seen[0].float(), logits

    def features(self, x: Tensor) -> Tensor:
        return self.both(x)[0]

    @property
    def last(self) -> nn.Linear:
        return [module for module in self.net.modules() if isinstance(module, nn.Linear)][-1]


@dataclass
class LoadedClassifier:
    """A classifier with the file it came from."""

    model: Classifier
    path: Path
    sha256: str
    arch: str


def kind(task: str, dataset: str, arch: str) -> str:
    """What a run's folder is called before `_exp_`."""
    return f"{dataset}_{task.lower()}_{arch}"


def newest(kinds: Sequence[str]) -> list[Path]:
    """The best checkpoints of all runs of these kinds, the run begun last first."""
    runs = [f for f in run_logger.LOGS.glob("*_exp_*") if f.name.partition("_exp_")[0] in kinds]
    runs.sort(key=lambda f: f.name.partition("_exp_")[2], reverse=True)
    return [path for run in runs if (path := run / "models" / checkpoint.BEST).is_file()]


def find(weights: str | None, dataset: str, arch: str) -> Path:
    """The file named, else the newest robust classifier, else the newest plain one.

    Raises:
        UserError: there is none.
    """
    if weights:
        return Path(weights)
    for task in ("Robust", "Clean"):
        if paths := newest([kind(task, dataset, arch)]):
            return paths[0]
    raise UserError(
        f"no {arch} classifier for {dataset} yet: train one with "
        "reverse_attack/train.py --task Robust, or name a file with --weights"
    )


def from_args(args: Namespace, num_classes: int, device: torch.device) -> LoadedClassifier:
    """The classifier that the command line means, in evaluation mode on the device."""
    path = find(args.weights, args.dataset, args.arch)
    trained = load(path, args.arch, num_classes, args.bf16)
    trained.model.to(device)
    print(f"Classifier: {relpath(path)}", flush=True)
    return trained


def load(path: Path, arch: str, num_classes: int, bf16: bool = False) -> LoadedClassifier:
    """A trained classifier: one of train.py's, of main.py's, or a public checkpoint.

    Raises:
        UserError: the file is missing or damaged, or does not fit `arch` or the number of classes.
    """
    content = checkpoint.load(path)
    found = content.get("kind")
    if not isinstance(found, str) and "task" not in content:  # perhaps an old file of main.py
        likely = registry.infer_arch(content["state_dict"], num_classes)
        if not checkpoint.state_dict_mismatch(
            registry.create_model(likely, num_classes), content["state_dict"]
        ):
            found = likely
    if isinstance(found, str) and found in registry.MODEL_REGISTRY:
        arch, net = found, registry.create_model(found, num_classes)
        model = Classifier(net, IMAGENET_MEAN, IMAGENET_STD, bf16)
    else:
        model = Classifier(net := resnets.build(arch, num_classes), bf16=bf16)
        weights = content["state_dict"]
        content["state_dict"] = {k: v for k, v in weights.items() if not k.startswith(UNUSED)}
    checkpoint.load_weights(net, content, path)
    return LoadedClassifier(model.eval(), path, sha256(path), arch)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
