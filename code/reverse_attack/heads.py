"""Trained self-supervised heads on disk: what a file holds, and how to find one."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepvision import checkpoint
from reverse_attack.classifier import LoadedClassifier, best_checkpoints, run_kind
from reverse_attack.contrastive import SIMILARITIES, ContrastiveLoss, Head
from reverse_attack.views import MIN_CROP
from utils import UserError, relpath


@dataclass
class TrainedHead:
    """A head with its bank, features (M, D) of clean images, and the rest of its checkpoint."""

    head: Head
    bank: Tensor
    ckpt: dict

    def contrastive_loss(
        self,
        loaded: LoadedClassifier,
        n_views: int,
        negatives: str = "bank",
        min_crop: float | None = None,
    ) -> ContrastiveLoss:
        """The loss that a reversal descends, in evaluation mode on the classifier's device.

        negatives: "bank", or "batch" for the other images of the batch.
        min_crop: the smallest area of a view's crop; None = as the head was trained.
        """
        bank = self.bank if negatives == "bank" else None
        min_crop = self.ckpt.get("min_crop", MIN_CROP) if min_crop is None else min_crop
        similarity = self.ckpt["loss"]
        loss = ContrastiveLoss(loaded.model, self.head, similarity, n_views, bank, min_crop)
        return loss.to(loaded.model.mean.device).eval()


def save(path: Path, head: Head, bank: Tensor, loaded: LoadedClassifier, **record: object) -> None:
    """Write a head with its bank (M, D), its classifier's hash, and `record`."""
    checkpoint.save(
        path,
        {
            "model_arch": loaded.arch,
            "state_dict": head.state_dict(),
            "bank": bank.cpu(),
            "classifier_sha256": loaded.sha256,
            **record,
        },
    )


def from_args(args: Namespace, loaded: LoadedClassifier) -> TrainedHead:
    """The head that --head names, else the newest one trained on this classifier.

    Raises:
        UserError: there is none, it belongs to another classifier, or it does not fit.
    """
    path, ckpt = find(args.head, args.logs, loaded, args.dataset)
    features = loaded.model.last.in_features
    head, bank = Head(features), ckpt.get("bank")
    checkpoint.load_weights(head, ckpt, path)
    fits = isinstance(bank, Tensor) and bank.shape[1:] == (features,)
    if not fits or ckpt.get("loss") not in SIMILARITIES:
        raise UserError(f"{path} is no self-supervised head of this project")
    print(f"Head: {relpath(path)}", flush=True)
    return TrainedHead(head.eval(), bank, ckpt)


def find(path: str | None, logs: Path, loaded: LoadedClassifier, dataset: str) -> tuple[Path, dict]:
    """The checkpoint at `path`, or the newest one of this classifier, and its content.

    Raises:
        UserError: there is none, or `path` belongs to another classifier.
    """
    if path:
        ckpt = checkpoint.load(path)
        if ckpt.get("classifier_sha256") != loaded.sha256:
            raise UserError(f"the head {path} belongs to another classifier than {loaded.path}")
        return Path(path), ckpt
    for newest in best_checkpoints(logs, run_kind("SSL", dataset, loaded.arch)):
        ckpt = checkpoint.load(newest)
        if ckpt.get("classifier_sha256") == loaded.sha256:
            return newest, ckpt
    raise UserError(
        f"no self-supervised head for {loaded.path} yet: train one with "
        "reverse_attack/train.py --task SSL"
    )


def untrained(loaded: LoadedClassifier, trained: TrainedHead, seed: int) -> TrainedHead:
    """The control: a new head with the bank and the settings of a trained one."""
    torch.manual_seed(seed)
    head = Head(loaded.model.last.in_features)
    return TrainedHead(head.eval(), trained.bank, trained.ckpt)
