"""White-box attacks on any `model(x) -> logits`, in l_inf, l_2 and l_1 balls. Torch alone.

    attack = PGD(norm="linf", epsilon=8, steps=20, pixels=Pixels("255"), early_stop=True)
    x_adv = attack.perturb(model, x, y)
    weaker = dataclasses.replace(attack, epsilon=4)

Madry et al., 2018 (PGD); Croce & Hein, 2020 (APGD, DLR) and 2021 (l_1: "Mind the Box");
Tramer & Boneh, 2019 (sparse l_1 step); Carlini & Wagner, 2017 (margin).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvision.attacks.norms import (
    ORDER,
    InputScale,
    column,
    project,
    random_start,
    sample_like,
    steepest_step,
)

GOALS = ("untargeted", "target", "least_likely", "random")

# ---------------------------------------------------------------------------------------------
# Losses: (logits (N, K), true label y (N,), target t (N,) or None) -> (N,), to be ascended
# ---------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, y: Tensor, t: Tensor | None) -> Tensor:
    """Of the true label, or minus that of the target."""
    if t is None:
        return F.cross_entropy(logits, y, reduction="none")
    return -F.cross_entropy(logits, t, reduction="none")


def margin(logits: Tensor, y: Tensor, t: Tensor | None) -> Tensor:
    """By how much the best other logit beats the true one, or the target the best other one.

    Carlini & Wagner, 2017, section V-A, f_6 without its floor; positive means success.
    """
    label = (y if t is None else t).unsqueeze(1)
    others = logits.scatter(1, label, -math.inf).amax(1)
    gap = others - logits.gather(1, label).squeeze(1)
    return gap if t is None else -gap


def dlr(logits: Tensor, y: Tensor, t: Tensor | None) -> Tensor:
    """Difference of logits ratio, blind to their scale (Croce & Hein, 2020, eq. 6 and 7)."""
    if logits.shape[1] < (3 if t is None else 4):
        raise ValueError("dlr needs at least 3 classes, with a target 4: use margin instead")
    z = logits.topk(3 if t is None else 4, dim=1).values
    tiny = torch.finfo(logits.dtype).tiny
    if t is None:
        return margin(logits, y, None) / (z[:, 0] - z[:, 2] + tiny)
    gap = logits.gather(1, t[:, None]) - logits.gather(1, y[:, None])
    return gap.squeeze(1) / (z[:, 0] - (z[:, 2] + z[:, 3]) / 2 + tiny)


LOSSES = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def attack_succeeded(logits: Tensor, y: Tensor, t: Tensor | None) -> Tensor:
    """Which samples `(N,)` are where the attack wants them: off their label, or on the target."""
    prediction = logits.argmax(1)
    return prediction != y if t is None else prediction == t


# ---------------------------------------------------------------------------------------------
# Attacks
# ---------------------------------------------------------------------------------------------


@contextmanager
def frozen_eval_mode(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Gradients on, evaluation mode, constant parameters; afterwards everything as it was."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    trainable = [p for module in modules[:1] for p in module.parameters() if p.requires_grad]
    try:
        if modules:
            model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)  # spares the gradients of the weights
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def constant(i: int, steps: int) -> float:
    return 1.0


def cosine(i: int, steps: int) -> float:
    """From 1 at the first step down towards 0 after the last."""
    return 0.5 * (1 + math.cos(math.pi * i / steps))


def select(state: dict, which) -> dict:
    """The per-sample tensors of some samples; None stays None."""
    return {name: None if v is None else v[which] for name, v in state.items()}


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What every attack shares: the ball, the goal, the loss, restarts and early stop.

    goal: "untargeted" (leave the label y), "target" (reach the label passed to `perturb`),
    "least_likely" (of the clean input, fixed from then on) or "random" (any label but y).
    loss: "ce", "margin", "dlr", or a callable with the signature of these losses.
    random_start: of the first run; further runs (`restarts` > 1) start at random in any case, and
    the worst run is kept for each sample: one that fooled the model, else the highest loss.
    early_stop: samples that fool the model leave the batch at once, with what fooled it.
    generator: makes an attack repeatable; the numbers are drawn for the samples left in the batch.
    """

    norm: str = "linf"
    epsilon: float = 0.1
    steps: int = 10
    loss: str | Callable[[Tensor, Tensor, Tensor | None], Tensor] = "ce"
    goal: str = "untargeted"
    random_start: bool = False
    restarts: int = 1
    early_stop: bool = False
    pixels: InputScale = InputScale()
    generator: torch.Generator | None = None

    def __post_init__(self):
        for value, known in ((self.norm, ORDER), (self.goal, GOALS), (self.loss, LOSSES)):
            if value not in known and not callable(value):
                raise ValueError(f"unknown {value!r}: one of {', '.join(known)}")
        if self.epsilon < 0 or self.steps < 0 or self.restarts < 1:
            raise ValueError("epsilon and steps must not be negative, restarts at least 1")

    def perturb(
        self,
        model: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Adversarial inputs for `x` `(N, C, ...)`, without a graph and of the same type.

        y `(N,)`: true labels, by default what the model says of `x`. target `(N,)`: for the goal
        "target". The model, its parameters, buffers and gradients, and `x` stay as they were.
        """
        with frozen_eval_mode(model):
            # At least float32, or small steps vanish; clones, as autograd needs ordinary tensors.
            x0 = x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)
            scale = self.pixels.scale(x0)

            def inputs(s: dict) -> Tensor:
                return (s["x"] + s["delta"] / scale).to(x.dtype)

            lo, hi = self.pixels.delta_bounds(x0)
            s = {"x": x0, "lo": lo, "hi": hi, "delta": torch.zeros_like(x0)}
            s["y"], s["t"], todo = self._labels(model, inputs(s), y, target)
            s["delta"] = self._worst_of_runs(lambda part: model(inputs(part)).float(), s, todo)
            return inputs(s).detach()

    def _labels(self, model, x, y, target) -> tuple[Tensor, Tensor | None, Tensor | slice]:
        """True labels, target labels, and which samples there is something to do for."""
        t, logits = None, None
        if y is None or self.goal in ("least_likely", "random") or self.early_stop:
            with torch.no_grad():
                logits = model(x)
        y = logits.argmax(1) if y is None else y.detach().clone()
        if self.goal == "target":
            if target is None:
                raise ValueError("the goal 'target' needs target labels")
            t = torch.as_tensor(target, device=x.device).detach().clone().expand(len(x))
        elif self.goal == "least_likely":
            t = logits.argmin(1)
        elif self.goal == "random":
            others = logits.shape[1] - 1
            t = sample_like(torch.randint, (len(x),), y, self.generator, others)
            t = t + (t >= y)
        todo = (
            (~attack_succeeded(logits, y, t)).nonzero().squeeze(1)
            if self.early_stop
            else slice(None)
        )
        return y, t, todo

    def _worst_of_runs(self, net: Callable[[dict], Tensor], s: dict, todo) -> Tensor:
        worst = s["delta"]
        won = torch.zeros_like(s["y"], dtype=torch.bool)
        highest = torch.full_like(s["x"].flatten(1)[:, 0], -math.inf)
        for run in range(self.restarts):
            part = select(s, todo)
            if len(part["y"]) == 0:
                break
            if run > 0 or self.random_start and self.steps > 0:
                part["delta"] = random_start(
                    part["lo"], part["hi"], self.norm, self.epsilon, self.generator
                )
            part["delta"] = self._run(net, part)
            if self.restarts == 1:
                worst[todo] = part["delta"]
                break
            with torch.no_grad():
                logits = net(part)
            wins = attack_succeeded(logits, part["y"], part["t"])
            loss = self._loss(logits, part)
            worse = torch.where(wins == won[todo], loss > highest[todo], wins)
            worst[todo] = torch.where(column(worse, worst), part["delta"], worst[todo])
            highest[todo] = torch.where(worse, loss, highest[todo])
            won[todo] |= wins
            if self.early_stop:
                todo = todo[~wins]
        return worst

    def _run(self, net: Callable[[dict], Tensor], s: dict) -> Tensor:
        """One run over the samples of `s` from their delta; returns the last (or best) delta."""
        result = s["delta"].clone()
        s["index"] = torch.arange(len(result), device=result.device)
        for i in range(self.steps):
            s["delta"] = s["delta"].detach().requires_grad_(True)
            logits = net(s)
            loss = self._loss(logits, s)
            (g,) = torch.autograd.grad(loss.sum(), s["delta"])
            s |= {"delta": s["delta"].detach(), "loss": loss.detach(), "g": g.nan_to_num(nan=0.0)}
            if self.early_stop:
                done = attack_succeeded(logits, s["y"], s["t"])
                result[s["index"][done]] = s["delta"][done]
                s = select(s, ~done)
                if len(s["index"]) == 0:
                    return result
            s["delta"] = self._step(i, s)
        result[s["index"]] = self._last(net, s)
        return result

    def _loss(self, logits: Tensor, s: dict) -> Tensor:
        loss = self.loss if callable(self.loss) else LOSSES[self.loss]
        return loss(logits, s["y"], s["t"])

    def _step(self, i: int, s: dict) -> Tensor:
        """The next delta, from delta, loss and gradient g in the state `s`, which may grow."""
        raise NotImplementedError

    def _last(self, net: Callable[[dict], Tensor], s: dict) -> Tensor:
        return s["delta"]

    def _ascend(self, s: dict, delta: Tensor, g: Tensor, length: float | Tensor, k=1) -> Tensor:
        if self.norm == "l1":  # a pixel with no room left would waste its part of the step
            g = torch.where(torch.where(g > 0, delta < s["hi"], delta > s["lo"]), g, 0)
        return self._project(s, delta + length * steepest_step(g, self.norm, k))

    def _project(self, s: dict, delta: Tensor) -> Tensor:
        return project(delta, self.norm, self.epsilon, s["lo"], s["hi"])


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent (Madry et al., 2018), steepest steps of a given size.

    step_size: in the unit of epsilon, 2.5 epsilon / steps by default, times `schedule(i, steps)`.
    sparsity: the share of all coordinates that one l_1 step moves.
    """

    step_size: float | None = None
    schedule: Callable[[int, int], float] = constant
    sparsity: float = 0.01

    def base_step(self) -> float:
        return 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size

    def _step(self, i: int, s: dict) -> Tensor:
        k = round(self.sparsity * s["g"][0].numel())
        length = self.base_step() * self.schedule(i, self.steps)
        return self._ascend(s, s["delta"], s["g"], length, k)


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """One step of size epsilon (Goodfellow et al., 2015); with `random_start` FGSM-RS, whose step
    of 1.25 epsilon reaches all of the ball's surface (Wong et al., 2020)."""

    steps: int = 1

    def base_step(self) -> float:
        default = self.epsilon * (1.25 if self.random_start else 1.0)
        return default if self.step_size is None else self.step_size


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """PGD with momentum that halves its step where the loss stalls (Croce & Hein, 2020, alg. 1).

    Returns the delta of highest loss (with early stop: the first that fooled). In l_1 the number
    of moved pixels adapts too, and there is no momentum (Croce & Hein, 2021, alg. 1).
    """

    random_start: bool = True
    early_stop: bool = True

    def _step(self, i: int, s: dict) -> Tensor:
        self._begin(s) if i == 0 else self._remember(s)
        back = self._adapt_sparsity(i, s) if self.norm == "l1" else self._adapt_step(i, s)
        back = column(back, s["delta"])
        delta = torch.where(back, s["best"], s["delta"])
        g = torch.where(back, s["best_g"], s["g"])
        before = torch.where(back, s["best"], s["before"])  # no momentum from a jump
        s["before"] = delta
        after = self._ascend(s, delta, g, column(s["eta"], delta), s["k"])
        if self.norm == "l1" or i == 0:
            return after
        return self._project(s, delta + 0.75 * (after - delta) + 0.25 * (delta - before))

    def _begin(self, s: dict) -> None:
        delta, loss = s["delta"], s["loss"]
        s |= {"best": delta, "best_g": s["g"], "before": delta}
        s |= {"highest": loss, "last": loss, "record": loss}
        s |= {"rises": torch.zeros_like(loss), "halved": torch.zeros_like(loss, dtype=torch.bool)}
        d = delta[0].numel()
        s["eta"] = torch.full_like(loss, self.epsilon * (1 if self.norm == "l1" else 2))
        s["k"] = torch.full_like(s["y"], d // 5)
        s["moved"] = torch.full_like(s["y"], d)

    def _remember(self, s: dict) -> None:
        s["rises"] = s["rises"] + (s["loss"] > s["last"])
        s["last"] = s["loss"]
        better = s["loss"] > s["highest"]
        s["highest"] = torch.where(better, s["loss"], s["highest"])
        better = column(better, s["delta"])
        s["best"] = torch.where(better, s["delta"], s["best"])
        s["best_g"] = torch.where(better, s["g"], s["best_g"])

    def _adapt_step(self, i: int, s: dict) -> Tensor:
        """Halve where the loss rose too rarely since the last checkpoint, or found no new best."""
        points = checkpoints(self.steps)
        if i not in points[1:]:
            return torch.zeros_like(s["halved"])
        interval = i - points[points.index(i) - 1]
        stuck = ~s["halved"] & (s["highest"] == s["record"])
        halve = (s["rises"] < 0.75 * interval) | stuck
        s["eta"] = torch.where(halve, s["eta"] / 2, s["eta"])
        s |= {"halved": halve, "record": s["highest"], "rises": torch.zeros_like(s["rises"])}
        return halve

    def _adapt_sparsity(self, i: int, s: dict) -> Tensor:
        """Move fewer pixels than the best delta has; while their number falls, by a full step."""
        if i == 0 or i % max(1, round(0.04 * self.steps)):
            return torch.zeros_like(s["halved"])
        moved = (s["best"] != 0).flatten(1).sum(1)
        fell = moved < 0.95 * s["moved"]
        shorter = (s["eta"] / 1.5).clamp(min=self.epsilon / 10)
        s["eta"] = torch.where(fell, self.epsilon, shorter)
        s |= {"k": (moved / 1.5).long(), "moved": moved}
        return fell

    @torch.no_grad()
    def _last(self, net: Callable[[dict], Tensor], s: dict) -> Tensor:
        if self.steps == 0:
            return s["delta"]
        logits = net(s)
        better = (self._loss(logits, s) > s["highest"]) | attack_succeeded(logits, s["y"], s["t"])
        return torch.where(column(better, s["delta"]), s["delta"], s["best"])


def checkpoints(steps: int) -> list[int]:
    """The iterations at which APGD looks back, 0 first (Croce & Hein, 2020, section 3.2)."""
    percent, gap, points = 22, 22, [0]
    while percent < 100:
        points.append(-(-percent * steps // 100))  # rounded up
        gap = max(gap - 3, 6)
        percent += gap
    return sorted(set(points))
