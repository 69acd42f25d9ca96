"""APGD: PGD that chooses its step size (Croce & Hein, 2020; l_1: Croce & Hein, 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepvision.attacks.norms import per_sample, sample_like
from deepvision.attacks.pgd import GradientAttack, Network, State


@dataclass(kw_only=True)
class APGDState(State):
    """The state of algorithm 1, one entry per sample.

    delta_max, f_max, g_max: the perturbation with the highest loss so far, that loss, its gradient;
    delta_prev, f_prev: those of the iteration before; eta: the step size;
    f_checkpoint: f_max at the last checkpoint; rises: the increases of the loss since then;
    halved: whether eta was halved there; k: coordinates that an l_1 step changes; l0: coordinates
    that delta_max changed at the last checkpoint.
    """

    delta_max: Tensor
    f_max: Tensor
    g_max: Tensor
    delta_prev: Tensor
    f_prev: Tensor
    eta: Tensor
    f_checkpoint: Tensor
    rises: Tensor
    halved: Tensor
    k: Tensor
    l0: Tensor


@dataclass(frozen=True, kw_only=True)
class APGD(GradientAttack):
    """PGD with momentum that halves its step size where the loss stalls (2020, algorithm 1).

    The delta with the highest loss is returned (with early stop: the first that succeeds). In l_1
    the number of changed coordinates adapts too, without momentum (2021, algorithm 1).

    multi_epsilon: start at a normal random point, search in larger balls first, 3 epsilon and
        2 epsilon, and continue from the projection of the best delta and with its sparsity; the
        last 40 % of the steps use epsilon (2021, section 3.3).
    """

    random_start: bool = True
    early_stop: bool = True
    multi_epsilon: bool = False

    def _run(self, net: Network, s: State) -> Tensor:
        if not self.multi_epsilon:
            return super()._run(net, s)
        steps = math.ceil(0.3 * self.steps)
        s.delta = sample_like(torch.randn, s.delta.shape, s.delta, self.generator)
        for factor in (3, 2):
            wide = replace(
                self,
                epsilon=factor * self.epsilon,
                steps=steps,
                early_stop=False,
                multi_epsilon=False,
            )
            s.delta = wide._run(net, replace(s, delta=wide._project(s, s.delta)))
        last = replace(self, steps=self.steps - 2 * steps, multi_epsilon=False)
        return last._run(net, replace(s, delta=last._project(s, s.delta)))

    def _step(self, i: int, s: State) -> APGDState:
        s = self._begin(s) if i == 0 else self._remember(s)
        restart = self._adapt_sparsity(i, s) if self.norm == "l1" else self._adapt_step(i, s)
        restart = per_sample(restart, s.delta)
        delta = torch.where(restart, s.delta_max, s.delta)
        g = torch.where(restart, s.g_max, s.g)
        delta_prev = torch.where(restart, s.delta_max, s.delta_prev)  # no momentum from a jump
        s.delta_prev = delta
        z = self._ascend(s, delta, g, per_sample(s.eta, delta), s.k)
        if self.norm == "l1" or i == 0:
            s.delta = z
        else:
            s.delta = self._project(s, delta + 0.75 * (z - delta) + 0.25 * (delta - delta_prev))
        return s

    def _begin(self, s: State) -> APGDState:
        d = s.delta[0].numel()
        l0 = (s.delta != 0).flatten(1).sum(1)
        l0 = torch.where(l0 > 0, l0, d)  # a start at x
        return APGDState(
            **vars(s),
            delta_max=s.delta,
            f_max=s.f,
            g_max=s.g,
            delta_prev=s.delta,
            f_prev=s.f,
            eta=torch.full_like(s.f, self.epsilon * (1 if self.norm == "l1" else 2)),
            f_checkpoint=s.f,
            rises=torch.zeros_like(s.f),
            halved=torch.zeros_like(s.f, dtype=torch.bool),
            k=(l0 / 1.5).long().clamp(max=d // 5),
            l0=l0,
        )

    def _remember(self, s: APGDState) -> APGDState:
        s.rises = s.rises + (s.f > s.f_prev)
        s.f_prev = s.f
        better = s.f > s.f_max
        s.f_max = torch.where(better, s.f, s.f_max)
        better = per_sample(better, s.delta)
        s.delta_max = torch.where(better, s.delta, s.delta_max)
        s.g_max = torch.where(better, s.g, s.g_max)
        return s

    def _adapt_step(self, i: int, s: APGDState) -> Tensor:
        """Halve eta where the loss rose too rarely or found no new maximum; return where (N,)."""
        points = checkpoints(self.steps)
        if i not in points[1:]:
            return torch.zeros_like(s.halved)
        interval = i - points[points.index(i) - 1]
        stalled = ~s.halved & (s.f_max == s.f_checkpoint)
        s.halved = (s.rises < 0.75 * interval) | stalled
        s.eta = torch.where(s.halved, s.eta / 2, s.eta)
        s.f_checkpoint, s.rises = s.f_max, torch.zeros_like(s.rises)
        return s.halved

    def _adapt_sparsity(self, i: int, s: APGDState) -> Tensor:
        """Change fewer coordinates than delta_max does; return (N,) where l0 fell (restart)."""
        if i == 0 or i % max(1, self.steps // 25):
            return torch.zeros_like(s.halved)
        l0 = (s.delta_max != 0).flatten(1).sum(1)
        fell = l0 < 0.95 * s.l0
        shorter = (s.eta / 1.5).clamp(min=self.epsilon / 10)
        s.eta = torch.where(fell, self.epsilon, shorter)
        s.k, s.l0 = (l0 / 1.5).long(), l0
        return fell

    @torch.no_grad()
    def _last(self, net: Network, s: State) -> Tensor:
        if self.steps == 0:
            return s.delta
        if self.eot > 1:
            f = sum(self._loss(net(s), s) for _ in range(self.eot)) / self.eot
            better = f > s.f_max
        else:
            logits = net(s)
            better = (self._loss(logits, s) > s.f_max) | self._succeeded(logits, s.y, s.t)
        return torch.where(per_sample(better, s.delta), s.delta, s.delta_max)


def checkpoints(steps: int) -> list[int]:
    """The iterations where APGD checks its progress, 0 first (Croce & Hein, 2020, section 3.2)."""
    percent, gap, points = 22, 22, [0]
    while percent < 100:
        points.append(-(-percent * steps // 100))  # rounded up
        gap = max(gap - 3, 6)
        percent += gap
    return sorted(set(points))
