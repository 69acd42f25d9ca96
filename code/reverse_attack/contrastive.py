"""The contrastive task that the reversal solves: InfoNCE on views of an image, its small head.

Mao et al., 2021, "Adversarial Attacks are Reversible with Natural Supervision" (arXiv 2103.14222),
section 3.1; InfoNCE: van den Oord et al., 2018; several positives: Khosla et al., 2020, eq. 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverse_attack.classifier import Classifier
from reverse_attack.views import views

TEMPERATURE = 0.2
SIMILARITIES = ("Cosine", "Dot")
WIDTHS = {640: (256, 16), 512: (128, 8)}  # of features to the head's two layers; others: below
NARROW_WIDTHS = (128, 16)


class Head(nn.Sequential):
    """Features `(..., D)` to embeddings `(..., E)`."""

    def __init__(self, features: int):
        hidden, out = WIDTHS.get(features, NARROW_WIDTHS)
        super().__init__(
            nn.Linear(features, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, out),
        )

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.flatten(0, -2)).unflatten(0, features.shape[:-1])


def info_nce(z: Tensor, similarity: str = "Cosine", bank: Tensor | None = None) -> Tensor:
    """The loss of each image `(N,)` from the embeddings of its views `(N, V, E)`.

    Each view is to pick the image's other views among the candidates: all other views of the
    batch, or, with a bank `(M, E)`, the image's other views and the bank. The mean over positives,
    then over views.
    """
    N, V, _ = z.shape
    if similarity == "Cosine":
        z = F.normalize(z, dim=2)
        bank = None if bank is None else F.normalize(bank, dim=1)
    itself = torch.eye(V, dtype=torch.bool, device=z.device)
    own = z @ z.transpose(1, 2) / TEMPERATURE  # (N, V, V)
    if bank is None:
        flat = z.flatten(0, 1)  # (N V, E)
        everything = flat @ flat.T / TEMPERATURE
        everything = everything.masked_fill(torch.eye(N * V, device=z.device).bool(), -math.inf)
        log_total = everything.logsumexp(1).view(N, V)
    else:
        others = own.masked_fill(itself, -math.inf)
        log_total = torch.cat([others, z @ bank.T / TEMPERATURE], dim=2).logsumexp(2)
    positives = own.masked_fill(itself, 0).sum(2) / (V - 1)  # (N, V)
    return (log_total - positives).mean(1)


def chance(candidates: int) -> float:
    """The loss of a head that tells nothing: every candidate is as likely."""
    return math.log(candidates)


class ContrastiveLoss(nn.Module):
    """Pixels `(N, 3, H, W)` to the loss of each image `(N,)`, on views drawn anew at each call.

    bank: features `(M, D)` of clean images to be the negatives, so that an image's loss does not
        depend on its neighbours; None = the other images of the batch.
    generator: what the views are drawn from; whoever wants them repeated seeds it.
    """

    def __init__(
        self,
        classifier: Classifier,
        head: Head,
        similarity: str = "Cosine",
        n_views: int = 4,
        bank: Tensor | None = None,
    ):
        super().__init__()
        self.classifier, self.head = classifier, head
        self.similarity, self.n_views = similarity, n_views
        self.register_buffer("bank", bank, persistent=False)
        self.generator = torch.Generator()

    def on_views(self, n: int) -> ContrastiveLoss:
        """The same on n views of each image, drawn by a generator of its own."""
        same = self.classifier, self.head, self.similarity
        return ContrastiveLoss(*same, n, self.bank)

    def forward(self, x: Tensor) -> Tensor:
        seen = views(x, self.n_views, self.generator)
        features = self.classifier.features(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
        bank = None if self.bank is None else self.head(self.bank)
        return info_nce(self.head(features), self.similarity, bank)
