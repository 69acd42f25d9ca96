"""FAB-T, the targeted Fast Adaptive Boundary attack (Croce & Hein, 2020, arXiv 1907.02044)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepvision.attacks.norms import lp_norm, per_sample
from deepvision.attacks.pgd import Attack, Network, State


@dataclass(kw_only=True)
class FABState(State):
    """delta_min: the smallest successful perturbation so far, r_min (N,): its norm."""

    delta_min: Tensor
    r_min: Tensor


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """Looks for the smallest change that crosses the boundary between y and the target.

    Each step projects the current point and the clean one onto the linearised boundary, takes a
    mean of the two (weight of the clean one at most alpha_max) with extrapolation eta, and after a
    success moves back towards the clean input by the factor beta (algorithm 1).

    Where no success within epsilon is found, x is returned unchanged. There is no loss to choose;
    any label but y is a success.

    Raises:
        ValueError: in `perturb`, a goal without targets.
    """

    steps: int = 100
    goal: str = "towards_target"
    early_stop: bool = True
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def _run(self, net: Network, s: State) -> Tensor:
        if s.t is None:
            raise ValueError("FAB needs a target: use the goal 'towards_target'")
        result = torch.zeros_like(s.delta)
        r_min = torch.full_like(s.delta.flatten(1)[:, 0], torch.inf)
        s = FABState(**vars(s), delta_min=result.clone(), r_min=r_min)
        s.index = torch.arange(len(result), device=result.device)
        for _ in range(self.steps):
            s.delta = self._cross_boundary(net, s)
            with torch.no_grad():
                success = net(s).argmax(1) != s.y
            r = lp_norm(s.delta, self.norm).flatten()
            smaller = success & (r < s.r_min)
            s.r_min = torch.where(smaller, r, s.r_min)
            s.delta_min = torch.where(per_sample(smaller, s.delta), s.delta, s.delta_min)
            s.delta = torch.where(per_sample(success, s.delta), self.beta * s.delta, s.delta)
            if self.early_stop:
                done = s.r_min <= self.epsilon
                result[s.index[done]] = s.delta_min[done]
                s = s.select(~done)
                if len(s.index) == 0:
                    return result
        within = per_sample(s.r_min <= self.epsilon, s.delta)
        result[s.index] = torch.where(within, s.delta_min, 0)
        return result

    def _cross_boundary(self, net: Network, s: FABState) -> Tensor:
        """The next delta: a step over the hyperplane that approximates z_t = z_y at delta."""
        delta = s.delta.detach().requires_grad_(True)
        z = net(_at(s, delta))
        f = (z.gather(1, s.t[:, None]) - z.gather(1, s.y[:, None])).squeeze(1)
        (w,) = torch.autograd.grad(f.sum(), delta)
        w, delta = w.nan_to_num(nan=0.0), s.delta
        b = (w * delta).flatten(1).sum(1) - f.detach()  # the boundary: <w, .> = b
        d = step_to_hyperplane(delta, w, b, self.norm, s.lo, s.hi)
        d_clean = step_to_hyperplane(torch.zeros_like(delta), w, b, self.norm, s.lo, s.hi)
        r, r_clean = (lp_norm(v, self.norm).clamp(min=1e-8) for v in (d, d_clean))
        alpha = (r / (r + r_clean)).clamp(max=self.alpha_max)
        delta = (1 - alpha) * (delta + self.eta * d) + alpha * self.eta * d_clean
        return torch.minimum(torch.maximum(delta, s.lo), s.hi)


def _at(s: State, delta: Tensor) -> State:
    return State(s.x, s.y, s.t, delta, s.lo, s.hi)


def step_to_hyperplane(
    delta: Tensor, w: Tensor, b: Tensor, norm: str, lo: Tensor, hi: Tensor
) -> Tensor:
    """The smallest d with <w, delta + d> = b and lo <= delta + d <= hi, per sample.

    delta, w, lo, hi: (N, ...); b: (N,). Where the box does not reach the hyperplane, d goes to the
    corner nearest to it. Sections 2.1 and 2.2 of the paper: d_i moves with the sign of +-w_i, and
    its magnitude is min(lambda v_i, cap_i) with v = 1 in l_inf and v = |w| in l_2; in l_1 the
    coordinates with the largest |w_i| move first, as far as they can.
    """
    c = b - (w * delta).flatten(1).sum(1)
    sign = w.sign() * per_sample(c.sign(), w)
    a, c = w.flatten(1).abs(), c.abs()[:, None]  # (N, D), (N, 1)
    cap = torch.where(sign > 0, hi - delta, delta - lo).clamp(min=0).flatten(1) * (a > 0)
    magnitude = _greedy(a, cap, c) if norm == "l1" else _level(a, cap, c, norm)
    return sign * magnitude.view(delta.shape)


def _greedy(a: Tensor, cap: Tensor, c: Tensor) -> Tensor:
    """Largest a first: sum a_i m_i = c with 0 <= m_i <= cap_i and the least sum of m."""
    order = a.argsort(dim=1, descending=True)
    a, cap = a.gather(1, order), cap.gather(1, order)
    before = (a * cap).cumsum(1) - a * cap
    m = ((c - before) / a.clamp(min=torch.finfo(a.dtype).tiny)).clamp(min=0).minimum(cap)
    return torch.zeros_like(m).scatter(1, order, m)


def _level(a: Tensor, cap: Tensor, c: Tensor, norm: str) -> Tensor:
    """min(lambda v, cap) with sum a_i min(lambda v_i, cap_i) = c, piecewise linear in lambda."""
    v = torch.ones_like(a) if norm == "linf" else a
    kink = (cap / v).nan_to_num(nan=0.0)  # 0 / 0: a coordinate without a gradient
    kink, order = kink.sort(dim=1)
    capped = (a * cap).gather(1, order).cumsum(1)
    slope = (a * v).gather(1, order)
    slope = slope.flip(1).cumsum(1).flip(1) - slope  # of the coordinates after this kink
    k = (capped + kink * slope < c).sum(1, keepdim=True)  # kinks below lambda
    total = (a * v).sum(1, keepdim=True)
    start = torch.cat([torch.zeros_like(c), capped], 1).gather(1, k)
    slope = torch.cat([total, slope], 1).gather(1, k)
    level = torch.where(slope > 0, (c - start) / slope, torch.inf)
    return torch.where(v > 0, level * v, 0).minimum(cap)
