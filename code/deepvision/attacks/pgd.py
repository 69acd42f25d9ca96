"""PGD and FGSM on any `model(x) -> logits`, and what all attacks share. Needs torch only.

    attack = PGD(norm="linf", epsilon=8, steps=20, pixels=InputScale("255"), early_stop=True)
    x_adv = attack.perturb(model, x, y)
    weaker = dataclasses.replace(attack, epsilon=4)

Goodfellow et al., 2015 (FGSM); Madry et al., 2018 (PGD); Tramer & Boneh, 2019 (sparse l_1 step);
Wong et al., 2020 (FGSM-RS).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from deepvision.attacks.losses import LOSSES, Loss, attack_succeeded
from deepvision.attacks.norms import (
    ORDERS,
    InputScale,
    per_sample,
    project,
    random_start,
    sample_like,
    steepest_step,
)

GOALS = ("untargeted", "target", "least_likely", "random", "towards_target")

Model = Callable[[Tensor], Tensor]  # inputs (N, C, ...) to logits (N, K)


@contextmanager
def frozen_eval_mode(model: Model) -> Iterator[None]:
    """Evaluation mode, frozen parameters, gradients enabled; the previous state is restored."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    trainable = [p for module in modules[:1] for p in module.parameters() if p.requires_grad]
    try:
        if modules:
            model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)  # saves computing the gradients of the weights
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


@torch.no_grad()
def is_randomised(model: Model, x: Tensor) -> bool:
    """Whether two passes of the first image of x (N, C, ...) give different logits."""
    if len(x) == 0:
        return False
    with frozen_eval_mode(model), torch.no_grad():
        a, b = model(x[:1]), model(x[:1])
    return not torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def constant(i: int, steps: int) -> float:
    """A schedule of step sizes: 1 at every step."""
    return 1.0


def cosine(i: int, steps: int) -> float:
    """A schedule of step sizes: from 1 at the first step down to 0 after the last."""
    return 0.5 * (1 + math.cos(math.pi * i / steps))


@dataclass
class State:
    """The samples that an attack works on; the first dimension of each tensor is the sample.

    x: clean inputs; y: true labels (N,); t: target labels (N,) or None; delta: the perturbation, in
    the unit of epsilon; lo, hi: its bounds. In a run, index: positions in the run's batch (N,);
    f: the loss at delta (N,); g: its gradient with respect to delta.
    """

    x: Tensor
    y: Tensor
    t: Tensor | None
    delta: Tensor
    lo: Tensor
    hi: Tensor
    index: Tensor | None = None
    f: Tensor | None = None
    g: Tensor | None = None

    def select(self, which: Tensor | slice) -> State:
        """A state of some of the samples: `which` is a mask, indices or a slice."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[which] for k, v in tensors.items() if v is not None})


Network = Callable[[State], Tensor]  # the logits (N, K) at the state's delta, in float32


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Options and restarts that all attacks share.

    norm, epsilon: the ball, in the unit of `pixels`.
    goal: "untargeted" (any label but y), "target" (the label passed to `perturb`), "least_likely"
        (of the clean input), "random" (a label drawn from all but y), or "towards_target" (the
        loss of the label passed to `perturb`, but any label except y is a success).
    loss: "ce", "margin", "dlr", or a callable (see deepvision.attacks.losses).
    random_start: of the first run; further runs (`restarts` > 1) always start at random. For each
        sample the best run is kept: a successful one, or the one with the highest loss.
    early_stop: a sample leaves the batch at its first success, with that perturbation; off with a
        warning where the model is randomised, as one success there may be luck.
    generator: makes an attack repeatable; random numbers are drawn for the samples in the batch.

    Raises:
        ValueError: an unknown norm, goal or loss, a negative number, or steps without an epsilon;
            in `perturb` an epsilon larger than the box of valid pixels.
    """

    norm: str = "linf"
    epsilon: float = 0.1
    steps: int = 10
    loss: str | Loss = "ce"
    goal: str = "untargeted"
    random_start: bool = False
    restarts: int = 1
    early_stop: bool = False
    pixels: InputScale = InputScale()
    generator: torch.Generator | None = None

    def __post_init__(self):
        for name, known in (("norm", ORDERS), ("goal", GOALS), ("loss", LOSSES)):
            value = getattr(self, name)
            if value not in known and not (name == "loss" and callable(value)):
                raise ValueError(f"unknown {name} {value!r}: one of {', '.join(known)}")
        if self.epsilon < 0 or self.steps < 0 or self.restarts < 1:
            raise ValueError("epsilon and steps must not be negative, restarts at least 1")
        if self.epsilon == 0 and self.steps > 0:
            raise ValueError("an attack with epsilon = 0 changes nothing: use a positive epsilon")

    def perturb(
        self, model: Model, x: Tensor, y: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Adversarial inputs for x (N, C, ...): detached, of the same shape and dtype.

        y (N,): true labels, by default the model's predictions. target (N,): for the goals "target"
        and "towards_target". The model (mode, parameters, buffers, gradients) and x are left
        unchanged.
        """
        radius = self.pixels.box_radius(x, self.norm)
        if self.epsilon > radius * (1 + 1e-6):
            raise ValueError(
                f"epsilon = {self.epsilon:g} is larger than the box of valid pixels, "
                f"{radius:g} in {self.norm}: check its unit ({self.pixels.unit})"
            )
        if self.early_stop and is_randomised(model, x):
            warnings.warn("this model is randomised: the attack does not stop early", stacklevel=2)
            return replace(self, early_stop=False).perturb(model, x, y, target)
        with frozen_eval_mode(model):
            # at least float32, or small steps vanish; a copy, as autograd needs ordinary tensors
            x0 = x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)
            scale, (lo, hi) = self.pixels.scale(x0), self.pixels.delta_bounds(x0)

            def inputs(x: Tensor, delta: Tensor) -> Tensor:
                return (x + delta / scale).to(dtype)

            dtype, delta = x.dtype, torch.zeros_like(x0)
            y, t, todo = self._labels(model, inputs(x0, delta), y, target)
            s = State(x0, y, t, delta, lo, hi)
            delta = self._best_of_runs(lambda s: model(inputs(s.x, s.delta)).float(), s, todo)
            return inputs(x0, delta).detach()

    def _labels(self, model, x, y, target) -> tuple[Tensor, Tensor | None, Tensor | slice]:
        """True labels, target labels or None, and the samples that are to be attacked."""
        t, logits = None, None
        if y is None or self.goal in ("least_likely", "random") or self.early_stop:
            with torch.no_grad():
                logits = model(x)
        y = logits.argmax(1) if y is None else y.detach().clone()
        if self.goal in ("target", "towards_target"):
            if target is None:
                raise ValueError(f"the goal {self.goal!r} needs target labels")
            t = torch.as_tensor(target, device=x.device).detach().clone().expand(len(x))
        elif self.goal == "least_likely":
            t = logits.argmin(1)
        elif self.goal == "random":
            others = logits.shape[1] - 1
            if others < 1:
                raise ValueError("the goal 'random' needs a model with at least two classes")
            t = sample_like(torch.randint, (len(x),), y, self.generator, others)
            t = t + (t >= y)
        if not self.early_stop:
            return y, t, slice(None)
        return y, t, (~self._succeeded(logits, y, t)).nonzero().squeeze(1)

    def _best_of_runs(self, net: Network, s: State, todo: Tensor | slice) -> Tensor:
        """The best delta of all restarts for each sample; that of `s` where nothing is to do."""
        best, f_max = s.delta, torch.full_like(s.x.flatten(1)[:, 0], -math.inf)
        succeeded = torch.zeros_like(s.y, dtype=torch.bool)
        for restart in range(self.restarts):
            part = s.select(todo)
            if len(part.y) == 0:
                break
            if restart > 0 or self.random_start and self.steps > 0:
                part.delta = random_start(part.lo, part.hi, self.norm, self.epsilon, self.generator)
            part.delta = self._run(net, replace(part))
            if self.restarts == 1:
                best[todo] = part.delta
                break
            with torch.no_grad():
                logits = net(part)
            success, f = self._succeeded(logits, part.y, part.t), self._loss(logits, part)
            better = torch.where(success == succeeded[todo], f > f_max[todo], success)
            best[todo] = torch.where(per_sample(better, best), part.delta, best[todo])
            f_max[todo] = torch.where(better, f, f_max[todo])
            succeeded[todo] |= success
            if self.early_stop:
                todo = todo[~success]
        return best

    def _loss(self, logits: Tensor, s: State) -> Tensor:
        loss = self.loss if callable(self.loss) else LOSSES[self.loss]
        return loss(logits, s.y, s.t)

    def _succeeded(self, logits: Tensor, y: Tensor, t: Tensor | None) -> Tensor:
        return attack_succeeded(logits, y, None if self.goal == "towards_target" else t)

    def _run(self, net: Network, s: State) -> Tensor:
        """One run from the delta of `s`: the last delta, or the best one."""
        raise NotImplementedError

    def _project(self, s: State, delta: Tensor) -> Tensor:
        return project(delta, self.norm, self.epsilon, s.lo, s.hi)


@dataclass(frozen=True, kw_only=True)
class GradientAttack(Attack):
    """Ascent on the loss by its gradient; a subclass gives one step of it.

    eot: forward and backward passes whose mean is the loss and its gradient (expectation over
        transformation; Athalye et al., 2018), for randomised models.
    """

    eot: int = 1

    def _run(self, net: Network, s: State) -> Tensor:
        result = s.delta.clone()
        s.index = torch.arange(len(result), device=result.device)
        for i in range(self.steps):
            logits = self._differentiate(net, s)
            if self.early_stop:
                done = self._succeeded(logits, s.y, s.t)
                result[s.index[done]] = s.delta[done]
                s = s.select(~done)
                if len(s.index) == 0:
                    return result
            s = self._step(i, s)
        result[s.index] = self._last(net, s)
        return result

    def _differentiate(self, net: Network, s: State) -> Tensor:
        """Set the loss f and its gradient g at delta, means of `eot` passes; the last logits."""
        passes = []
        s.delta = s.delta.detach().requires_grad_(True)
        for _ in range(self.eot):
            logits = net(s)
            f = self._loss(logits, s)
            passes.append((f.detach(), *torch.autograd.grad(f.sum(), s.delta)))
        f, g = (sum(values[1:], values[0]) / self.eot for values in zip(*passes, strict=True))
        s.delta, s.f, s.g = s.delta.detach(), f, g.nan_to_num(nan=0.0)
        return logits

    def _step(self, i: int, s: State) -> State:
        """The state with the next delta, from delta, loss f and gradient g."""
        raise NotImplementedError

    def _last(self, net: Network, s: State) -> Tensor:
        """The delta to return for the samples still in `s`."""
        return s.delta

    def _ascend(self, s: State, delta: Tensor, g: Tensor, length: float | Tensor, k=1) -> Tensor:
        if self.norm == "l1":  # a pixel at its bound would waste its part of the step
            g = torch.where(torch.where(g > 0, delta < s.hi, delta > s.lo), g, 0)
        return self._project(s, delta + length * steepest_step(g, self.norm, k))


@dataclass(frozen=True, kw_only=True)
class PGD(GradientAttack):
    """Projected gradient descent (Madry et al., 2018).

    step_size: in the unit of epsilon, by default 2.5 epsilon / steps; times `schedule(i, steps)`.
    sparsity: the fraction of all coordinates that one l_1 step changes.
    """

    step_size: float | None = None
    schedule: Callable[[int, int], float] = constant
    sparsity: float = 0.01

    def base_step(self) -> float:
        """The step size before the schedule, in the unit of epsilon."""
        return 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size

    def _step(self, i: int, s: State) -> State:
        k = round(self.sparsity * s.g[0].numel())
        length = self.base_step() * self.schedule(i, self.steps)
        s.delta = self._ascend(s, s.delta, s.g, length, k)
        return s


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """One step of size epsilon (Goodfellow et al., 2015).

    With `random_start` it is FGSM-RS, with a step of 1.25 epsilon (Wong et al., 2020).
    """

    steps: int = 1

    def base_step(self) -> float:
        """The step size, in the unit of epsilon."""
        default = self.epsilon * (1.25 if self.random_start else 1.0)
        return default if self.step_size is None else self.step_size
