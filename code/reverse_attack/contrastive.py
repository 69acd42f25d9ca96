"""The contrastive loss that the reversal descends: InfoNCE on views of an image, and its head.

Mao et al., 2021, "Adversarial Attacks are Reversible with Natural Supervision" (arXiv 2103.14222),
section 3.1; InfoNCE: van den Oord et al., 2018; several positives: Khosla et al., 2020, eq. 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverse_attack.classifier import Classifier
from reverse_attack.views import MIN_CROP, views

TEMPERATURE = 0.2
SIMILARITIES = ("Cosine", "Dot")
WIDTHS = {640: (256, 16), 512: (128, 8)}  # number of features: widths of the head's two layers
DEFAULT_WIDTHS = (128, 16)


class Head(nn.Sequential):
    """Linear, BatchNorm, ReLU, Linear: features (..., D) to embeddings (..., E)."""

    def __init__(self, features: int):
        hidden, out = WIDTHS.get(features, DEFAULT_WIDTHS)
        super().__init__(
            nn.Linear(features, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, out),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features (..., D) to embeddings (..., E); BatchNorm sees all of them as one batch."""
        return super().forward(features.flatten(0, -2)).unflatten(0, features.shape[:-1])


def info_nce(z: Tensor, similarity: str = "Cosine", bank: Tensor | None = None) -> Tensor:
    """The loss of each image (N,) from the embeddings of its views (N, V, E).

    For each view, the positives are the image's other views. The candidates are all other views of
    the batch, or, with a bank (M, E), the image's other views and the bank. Mean over positives,
    then over views.
    """
    N, V, _ = z.shape
    if similarity == "Cosine":
        z = F.normalize(z, dim=2)
        bank = None if bank is None else F.normalize(bank, dim=1)
    diagonal = torch.eye(V, dtype=torch.bool, device=z.device)
    within = z @ z.transpose(1, 2) / TEMPERATURE  # (N, V, V)
    if bank is None:
        flat = z.flatten(0, 1)  # (N V, E)
        logits = flat @ flat.T / TEMPERATURE
        logits = logits.masked_fill(torch.eye(N * V, device=z.device).bool(), -math.inf)
        log_total = logits.logsumexp(1).view(N, V)
    else:
        others = within.masked_fill(diagonal, -math.inf)
        log_total = torch.cat([others, z @ bank.T / TEMPERATURE], dim=2).logsumexp(2)
    positives = within.masked_fill(diagonal, 0).sum(2) / (V - 1)  # (N, V)
    return (log_total - positives).mean(1)


def chance(candidates: int) -> float:
    """The loss of a head whose embeddings carry no information: a uniform choice."""
    return math.log(candidates)


class ContrastiveLoss(nn.Module):
    """Images (N, 3, H, W) in [0, 1] to their losses (N,), on new views at each call.

    bank: features (M, D) of clean images that are the negatives, so that an image's loss does not
        depend on the rest of its batch; None = the other images of the batch.
    min_crop: the smallest area of a view's crop, as a fraction of the image.
    generator: draws the views; seed it to repeat them.
    """

    def __init__(
        self,
        classifier: Classifier,
        head: Head,
        similarity: str = "Cosine",
        n_views: int = 4,
        bank: Tensor | None = None,
        min_crop: float = MIN_CROP,
    ):
        super().__init__()
        self.classifier, self.head = classifier, head
        self.similarity, self.n_views, self.min_crop = similarity, n_views, min_crop
        self.register_buffer("bank", bank, persistent=False)
        self.generator = torch.Generator()

    def on_views(self, n: int) -> ContrastiveLoss:
        """The same loss on n views of each image, with a separate generator."""
        return ContrastiveLoss(
            self.classifier, self.head, self.similarity, n, self.bank, self.min_crop
        )

    def forward(self, x: Tensor) -> Tensor:
        """The losses (N,) of images (N, 3, H, W) in [0, 1]."""
        batch = views(x, self.n_views, self.generator, self.min_crop)  # (N, V, 3, H, W)
        features = self.classifier.features(batch.flatten(0, 1)).unflatten(0, batch.shape[:2])
        bank = None if self.bank is None else self.head(self.bank)
        return info_nce(self.head(features), self.similarity, bank)
