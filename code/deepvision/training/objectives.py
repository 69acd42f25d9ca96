"""Adversarial training: what a batch gives the optimizer to descend. torch and attacks alone.

An objective yields (logits, loss) once for each optimizer step that a batch is worth; whoever
iterates over it runs `loss.backward()` and the step in between.

    for logits, loss in objective(model, criterion, x, y, step):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

pgd      attacked batches (Madry et al., 2018, eq. 2.1)
fgsm-rs  the same, one step from a random start (Wong et al., 2020, algorithm 3)
free     a batch replayed, each backward pass for weights and pixels (Shafahi et al., 2019)
trades   clean loss, and the distance of attacked from clean outputs (Zhang et al., 2019, eq. 5)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvision.attacks.norms import InputScale, project, random_start, steepest_step
from deepvision.attacks.pgd import FGSM, PGD, frozen_eval_mode

Losses = Iterator[tuple[Tensor, Tensor]]  # (logits (N, K), loss ()), one for each step
Objective = Callable[[nn.Module, nn.Module, Tensor, Tensor, int], Losses]

STEPS = {"pgd": 3, "fgsm-rs": 1, "free": 2, "trades": 3}  # of the attack; replays where free


def standard(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, step: int = 0) -> Losses:
    """The objective of ordinary training."""
    logits = model(x)
    yield logits, criterion(logits, y)


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining:
    """The objective of one mode; the model's gradients never hold any of the attack's.

    epsilon: the l_inf ball, in the unit of `pixels`; the step size follows from it.
    steps: of the attack; where `free`, how often a batch is replayed.
    prob: the share of batches that are attacked; the others are trained on as they are.
    blend: the weight of the clean pixels in an attacked batch (0.5 = half and half).
    ramp: the steps of training between which epsilon grows from 0 to its full size. A network
        that is attacked while its outputs still mean nothing stays at chance.
    beta: what the second term of TRADES weighs (1 / lambda in its eq. 5).

    Random numbers come from torch's global generator: a batch's follow from its seed, and `free`
    starts each batch's perturbation anew where the paper carries the last one's over.
    """

    mode: str = "pgd"
    epsilon: float = 4.0
    steps: int = 3
    pixels: InputScale = InputScale("255")
    prob: float = 1.0
    blend: float = 0.0
    ramp: tuple[int, int] = (0, 0)
    beta: float = 6.0

    def __post_init__(self):
        if self.mode not in STEPS:
            raise ValueError(f"unknown mode {self.mode!r}: one of {', '.join(STEPS)}")

    def epsilon_at(self, step: int) -> float:
        start, end = self.ramp
        return self.epsilon * min(1.0, max(0.0, (step - start + 1) / max(end - start, 1)))

    def __call__(
        self, model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, step: int
    ) -> Losses:
        epsilon = self.epsilon_at(step)
        if epsilon == 0 or torch.rand(()) >= self.prob:
            return standard(model, criterion, x, y)
        if self.mode == "free":
            return self._free(model, criterion, x, y, epsilon)
        if self.mode == "trades":
            return self._trades(model, criterion, x, y, epsilon)
        x_adv = self.attack(epsilon).perturb(model, x, y)
        return standard(model, criterion, torch.lerp(x_adv, x, self.blend), y)

    def attack(self, epsilon: float) -> PGD:
        kind = FGSM if self.mode == "fgsm-rs" else PGD
        return kind(epsilon=epsilon, steps=self.steps, random_start=True, pixels=self.pixels)

    def _free(self, model, criterion, x, y, epsilon) -> Losses:
        scale, (lo, hi) = self.pixels.scale(x), self.pixels.delta_bounds(x)
        delta = random_start(lo, hi, "linf", epsilon)
        for left in reversed(range(self.steps)):
            delta.requires_grad_(left > 0)  # the pixels' gradient costs, and none needs the last
            logits = model(x + delta / scale)
            yield logits, criterion(logits, y)
            if left > 0:
                g = delta.grad  # of the backward pass that the weights were trained by
                step = epsilon * steepest_step(g, "linf")
                delta = project(delta.detach() + step, "linf", epsilon, lo, hi)

    def _trades(self, model, criterion, x, y, epsilon) -> Losses:
        with frozen_eval_mode(model), torch.no_grad():
            p = model(x).softmax(1)
        attack = replace(self.attack(epsilon), loss=lambda logits, *_: divergence(logits, p))
        x_adv = attack.perturb(model, x, y)
        clean, attacked = model(x), model(x_adv)
        distance = divergence(attacked, clean.softmax(1)).mean()
        yield attacked, criterion(clean, y) + self.beta * distance


def divergence(logits: Tensor, p: Tensor) -> Tensor:
    """Kullback-Leibler's, of the logits' distribution from p: (N, K), (N, K) -> (N,)."""
    return F.kl_div(logits.log_softmax(1), p, reduction="none").sum(1)


@torch.no_grad()
def robust_accuracy(model: nn.Module, attack: PGD, x: Tensor, y: Tensor) -> float:
    """The share of x (N, C, H, W) that keeps its label y (N,) under attack, in per cent."""
    x_adv = attack.perturb(model, x, y)
    with frozen_eval_mode(model), torch.no_grad():
        return 100 * (model(x_adv).argmax(1) == y).float().mean().item()


@dataclass
class CatastrophicOverfittingGuard:
    """Notices catastrophic overfitting: trained on weak attacks, a network may lose all its
    robustness against strong ones within an epoch (Wong et al., 2020, section 5.4).

    chance: the accuracy of guessing, in per cent
    best: the highest robust accuracy so far, in per cent
    epoch, weights: the last epoch that kept half of it, and the network after it
    """

    chance: float
    best: float = 0.0
    epoch: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def collapsed(self, model: nn.Module, robust: float, epoch: int) -> bool:
        """Whether `robust` is a collapse, and the last good weights are in `model` again.

        A network that only guesses has nothing to lose: a fall counts from 1.5 times chance.
        """
        if self.best > 1.5 * self.chance and robust < self.best / 2:
            model.load_state_dict(self.weights)
            return True
        self.best, self.epoch = max(self.best, robust), epoch
        self.weights = {name: v.detach().clone() for name, v in model.state_dict().items()}
        return False

    def state(self) -> dict:
        return {"best": self.best, "epoch": self.epoch, "weights": self.weights}
