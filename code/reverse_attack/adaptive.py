"""The defended classifier, and attacks that know its defence.

Athalye et al., 2018 (BPDA, EOT); Croce et al., 2022, "Evaluating the Adversarial Robustness of
Adaptive Test-time Defenses" (arXiv 2202.13711); Mao et al., 2021, section 3.3 (defence-aware).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from reverse_attack.classifier import Classifier
from reverse_attack.contrastive import ContrastiveLoss
from reverse_attack.reversal import Reversal

ATTACKER_SEEDS = 10**6  # seeds from here on are the attacker's: the defender's stay below


class Defended(nn.Module):
    """The classifier behind the reversal, differentiable for an attack: images to log p (N, K).

    BPDA: the reversal runs as it is, and its gradient is replaced by the identity's. The
    classifier's gradient is taken at the reversed image.
    EOT: p is the mean over `draws` reversals, each on new views.

    fixed_seed: every reversal uses the views of this seed, so that the gradient is deterministic.
    """

    def __init__(
        self,
        classifier: Classifier,
        reversal: Reversal,
        draws: int = 1,
        seed: int = 0,
        fixed_seed: int | None = None,
    ):
        super().__init__()
        self.classifier, self.loss = classifier, reversal.loss
        self.reversal, self.draws = reversal, draws
        if fixed_seed is None:
            self.seeds = itertools.count(ATTACKER_SEEDS * (1 + seed))
        else:
            self.seeds = itertools.repeat(fixed_seed)

    def forward(self, x: Tensor) -> Tensor:
        """log p (N, K) of images (N, 3, H, W); each call takes the next `draws` seeds."""
        log_p = []
        for seed in itertools.islice(self.seeds, self.draws):
            change = self.reversal(x.detach(), seed) - x.detach()
            log_p.append(self.classifier(x + change).log_softmax(1))
        return torch.stack(log_p).logsumexp(0) - math.log(self.draws)


class DefenceAware(nn.Module):
    """The undefended classifier, with an attack loss that also keeps the views in agreement.

    The attack ascends `loss` - weight * contrastive loss, so that the reversal finds little to
    repair. Pass the object as the model and its `joint_loss` as the loss of one attack: each call
    of the model stores the contrastive loss for the next call of `joint_loss`.
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
        contrastive.generator.manual_seed(ATTACKER_SEEDS * (1 + seed))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, 3, H, W); stores their contrastive losses (N,)."""
        self.disagreement = self.contrastive(x)
        return self.classifier(x)

    def joint_loss(self, logits: Tensor, y: Tensor, t: Tensor | None) -> Tensor:
        """The loss (N,) to ascend, for logits (N, K) of the last call of the model."""
        return self.loss(logits, y, t) - self.weight * self.disagreement
