"""The defended classifier, and attacks that know of its defence.

Athalye et al., 2018 (BPDA, EOT); Croce et al., 2022, "Evaluating the Adversarial Robustness of
Adaptive Test-time Defenses" (arXiv 2202.13711); Mao et al., 2021, section 3.3 (defence-aware).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from reverse_attack.classifier import Classifier
from reverse_attack.contrastive import ContrastiveLoss
from reverse_attack.reversal import Reversal

ATTACKERS_SEEDS = 10**6  # from here on: the attacker cannot know the defender's draws


class Defended(nn.Module):
    """The classifier behind the reversal, for an attack to differentiate: pixels to log p `(N, K)`.

    BPDA: the reversal is run as it is, and its gradient taken for that of the identity; the
    classifier's gradient is that at the reversed image. EOT: p is the mean over `draws` runs, each
    on views of its own, drawn anew at each call.
    """

    def __init__(self, classifier: Classifier, reversal: Reversal, draws: int, seed: int):
        super().__init__()
        self.classifier, self.loss = classifier, reversal.loss
        self.reversal, self.draws = reversal, draws
        self.next_seed = ATTACKERS_SEEDS * (1 + seed)

    def forward(self, x: Tensor) -> Tensor:
        log_p = []
        for _ in range(self.draws):
            change = self.reversal(x.detach(), self.next_seed) - x.detach()
            log_p.append(self.classifier(x + change).log_softmax(1))
            self.next_seed += 1
        return torch.stack(log_p).logsumexp(0) - math.log(self.draws)


class DefenceAware(nn.Module):
    """The classifier as it is, with a loss that also asks for views that agree already.

    Ascends `loss` - weight * contrastive loss, so that the reversal finds little to mend. Pass the
    object as the model and its `joint_loss` as the loss of one attack: each call of the model
    leaves the contrastive loss for the next call of the loss.
    """

    def __init__(
        self,
        classifier: Classifier,
        contrastive: ContrastiveLoss,
        loss: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        weight: float,
        seed: int,
    ):
        super().__init__()
        self.classifier, self.contrastive = classifier, contrastive
        self.loss, self.weight = loss, weight
        contrastive.generator.manual_seed(ATTACKERS_SEEDS * (1 + seed))

    def forward(self, x: Tensor) -> Tensor:
        self.disagreement = self.contrastive(x)
        return self.classifier(x)

    def joint_loss(self, logits: Tensor, y: Tensor, t: Tensor | None) -> Tensor:
        return self.loss(logits, y, t) - self.weight * self.disagreement
