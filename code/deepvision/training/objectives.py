"""Training objectives: the loss of a batch. Needs only torch and the attacks.

    for _ in range(objective.begin_batch(step)):
        logits, loss = objective(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

Standard   cross-entropy, or any criterion
CutMix     batches in which each image holds a rectangle of another (Yun et al., 2019)
AdversarialTraining
    pgd      attacked batches (Madry et al., 2018, eq. 2.1)
    fgsm-rs  the same, one step from a random start (Wong et al., 2020, algorithm 3)
    free     a batch replayed; each backward pass serves weights and pixels (Shafahi et al., 2019)
    trades   clean loss, and divergence of attacked from clean outputs (Zhang et al., 2019, eq. 5)

Random numbers come from torch's global generator, which the training loop seeds for each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvision.attacks import (
    FGSM,
    PGD,
    InputScale,
    frozen_eval_mode,
    project,
    random_start,
    steepest_step,
)

STEPS = {"pgd": 3, "fgsm-rs": 1, "free": 2, "trades": 3}  # of the attack; replays where free

Criterion = Callable[[Tensor, Tensor], Tensor]  # logits (N, K), target (N,) or (N, K) -> ()


class Objective(Protocol):
    """What a batch minimises."""

    def begin_batch(self, step: int) -> int:
        """Prepare for the batch of this training step; return how many optimizer steps it takes."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and loss () of images (N, C, H, W) and labels (N,)."""


@dataclass
class Standard:
    """The criterion on the batch as it is."""

    criterion: Criterion = F.cross_entropy

    def begin_batch(self, step: int) -> int:
        """One optimizer step per batch."""
        return 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return logits, self.criterion(logits, y)


@dataclass
class CutMix(Standard):
    """Each image gets a rectangle of its neighbour; labels mix by area (Yun et al., 2019, eq. 1).

    prob: the fraction of batches that are mixed; the others are used as they are.
    """

    num_classes: int = 100
    prob: float = 0.5
    mixes: bool = field(default=False, init=False)  # the current batch

    def __post_init__(self) -> None:
        from torchvision.transforms import v2  # takes seconds to import

        self.mix = v2.CutMix(num_classes=self.num_classes)

    def begin_batch(self, step: int) -> int:
        """Decide whether this batch is mixed; one optimizer step."""
        self.mixes = bool(torch.rand(()) < self.prob)
        return 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.mixes:
            x, y = self.mix(x, y)  # y: (N,) -> (N, K)
        return super().__call__(model, x, y)


@dataclass(kw_only=True)
class AdversarialTraining:
    """One mode of adversarial training; the model's gradients never include the attack's.

    epsilon: radius of the l_inf ball, in the unit of `scale`; the step size follows from it.
    steps: of the attack; for `free`, how often a batch is replayed.
    attack_prob: the fraction of batches that are attacked; the others are used as they are.
    clean_mix: the weight of the clean image in an attacked one (0.5 = the mean of both).
    eps_warmup: the training steps between which epsilon grows from 0 to its full size. A network
        that is attacked while its outputs are still random stays at chance.
    beta: the weight of the second term of TRADES (1 / lambda in its eq. 5).

    `free` starts each batch's perturbation at random; the paper carries over the last batch's.
    """

    criterion: Criterion = F.cross_entropy
    mode: str = "pgd"
    epsilon: float = 4.0
    steps: int = 3
    scale: InputScale = InputScale("255")
    attack_prob: float = 1.0
    clean_mix: float = 0.0
    eps_warmup: tuple[int, int] = (0, 0)
    beta: float = 6.0
    eps: float = field(default=0.0, init=False)  # of the current batch; 0: it stays clean
    delta: Tensor | None = field(default=None, init=False)  # `free`: of the current batch
    replays_left: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.mode not in STEPS:
            raise ValueError(f"unknown mode {self.mode!r}: one of {', '.join(STEPS)}")

    def epsilon_at(self, step: int) -> float:
        """The radius at a training step."""
        start, end = self.eps_warmup
        return self.epsilon * min(1.0, max(0.0, (step - start + 1) / max(end - start, 1)))

    def begin_batch(self, step: int) -> int:
        """Decide whether this batch is attacked; `free` then takes `steps` optimizer steps."""
        self.eps, self.delta = self.epsilon_at(step), None
        if self.eps > 0 and torch.rand(()) >= self.attack_prob:
            self.eps = 0.0
        self.replays_left = self.steps if self.mode == "free" and self.eps > 0 else 1
        return self.replays_left

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.eps == 0:
            return Standard(self.criterion)(model, x, y)
        if self.mode == "free":
            return self._free(model, x, y)
        if self.mode == "trades":
            return self._trades(model, x, y)
        x_adv = self.attack().perturb(model, x, y)
        return Standard(self.criterion)(model, torch.lerp(x_adv, x, self.clean_mix), y)

    def attack(self) -> PGD:
        """The attack on the current batch."""
        kind = FGSM if self.mode == "fgsm-rs" else PGD
        return kind(epsilon=self.eps, steps=self.steps, random_start=True, pixels=self.scale)

    def _free(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = self.scale.delta_bounds(x)
        if self.delta is None:
            delta = random_start(lo, hi, "linf", self.eps)
        else:  # the gradient of the backward pass that trained the weights
            step = self.eps * steepest_step(self.delta.grad, "linf")
            delta = project(self.delta.detach() + step, "linf", self.eps, lo, hi)
        self.replays_left -= 1
        self.delta = delta.requires_grad_(self.replays_left > 0)  # the last needs no gradient
        logits = model(x + self.delta / self.scale.scale(x))
        return logits, self.criterion(logits, y)

    def _trades(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with frozen_eval_mode(model), torch.no_grad():
            log_p = model(x).log_softmax(1)
        attack = replace(self.attack(), loss=lambda logits, *_: divergence(logits, log_p))
        x_adv = attack.perturb(model, x, y)
        clean, attacked = model(x), model(x_adv)
        distance = divergence(attacked, clean.log_softmax(1)).mean()
        return attacked, self.criterion(clean, y) + self.beta * distance


def divergence(logits: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || softmax(logits)) of each sample: (N, K), log-probabilities (N, K) -> (N,).

    Of log p, because the gradient over p itself is not finite where p underflows to 0.
    """
    log_q = logits.log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
