"""A trained self-supervised head on disk: what it holds, where to find it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deepvision import checkpoint
from reverse_attack import classifier
from reverse_attack.classifier import LoadedClassifier
from reverse_attack.contrastive import SIMILARITIES, ContrastiveLoss, Head
from utils import UserError, relpath


@dataclass
class TrainedHead:
    """A head with its bank: features `(M, D)` of clean images, the fixed negatives."""

    head: Head
    bank: Tensor
    content: dict

    def loss(
        self, trained: LoadedClassifier, n_views: int, negatives: str = "bank"
    ) -> ContrastiveLoss:
        """What a reversal descends; negatives: "bank", or "batch" for the other images there."""
        bank = self.bank if negatives == "bank" else None
        loss = ContrastiveLoss(trained.model, self.head, self.content["loss"], n_views, bank)
        return loss.to(trained.model.mean.device).eval()


def save(path: Path, head: Head, bank: Tensor, trained: LoadedClassifier, **about: object) -> None:
    checkpoint.save(
        path,
        {
            "model_arch": trained.arch,
            "state_dict": head.state_dict(),
            "bank": bank.cpu(),
            "classifier_sha256": trained.sha256,
            **about,
        },
    )


def from_args(args: Namespace, trained: LoadedClassifier) -> TrainedHead:
    """--head, else the newest head that was trained on this very classifier.

    Raises:
        UserError: there is none, it belongs to another classifier, or it does not fit.
    """
    path, content = find(args.head, trained, args.dataset)
    features = trained.model.last.in_features
    head, bank = Head(features), content.get("bank")
    checkpoint.load_weights(head, content, path)
    fits = isinstance(bank, Tensor) and bank.shape[1:] == (features,)
    if not fits or content.get("loss") not in SIMILARITIES:
        raise UserError(f"{path} is no self-supervised head of this project")
    print(f"Head: {relpath(path)}", flush=True)
    return TrainedHead(head.eval(), bank, content)


def find(path: str | None, trained: LoadedClassifier, dataset: str) -> tuple[Path, dict]:
    if path:
        content = checkpoint.load(path)
        if content.get("classifier_sha256") != trained.sha256:
            raise UserError(f"the head {path} belongs to another classifier than {trained.path}")
        return Path(path), content
    for newest in classifier.newest([classifier.kind("SSL", dataset, trained.arch)]):
        content = checkpoint.load(newest)
        if content.get("classifier_sha256") == trained.sha256:
            return newest, content
    raise UserError(
        f"no self-supervised head for {trained.path} yet: train one with "
        "reverse_attack/train.py --task SSL"
    )


def untrained(trained: LoadedClassifier, like: TrainedHead, seed: int) -> TrainedHead:
    """The control: the same bank, a head as it is before training."""
    torch.manual_seed(seed)
    head: nn.Module = Head(trained.model.last.in_features)
    return TrainedHead(head.eval(), like.bank, like.content)
