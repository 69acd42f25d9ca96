"""Part III: PGDAttack on a small network of ours, against right and wrong attacks.

The handout asks for the ball, not for the range of valid pixels, and lets the label be picked at
each step: a missing clamp, a changing label or a random start is a remark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import combinations
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks.grading import (
    Check,
    CheckFailed,
    Findings,
    attempt,
    compare,
    expect,
    find,
    fixed_state,
    value,
)

CLASSES, SIZE = 6, 16
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
DARKEST, BRIGHTEST = -MEAN / STD, (1 - MEAN) / STD

WRONG_SIGN = "wrong sign: it climbs the loss of the least likely label; step against the gradient"
UNTARGETED = "it climbs the loss of the likeliest label: the assignment descends the least likely's"
SURER = "wrong sign and label: it makes the network surer of what it sees"
PIXEL_UNITS = "step_size and epsilon are divided by std: they are in units of the normalised input"
CLEAN_GRADIENT = "every step takes the gradient at the clean image: take it at the current iterate"
ACCUMULATED = "gradients add up over the steps: take each step's alone (torch.autograd.grad)"
NO_SIGN = "the gradient's sign is not taken"
NOT_NORMALISED = "pixels are clamped to [0, 1], but the input is normalised"
NO_PROJECTION = "the ball's projection is missing: keep x_adv within epsilon of the input"
LATE_PROJECTION = "the ball's projection comes after the last step alone: project after each"
SCALED = "step_size and epsilon are divided by 255: they are in units of the normalised input"
ONE_STEP = "only one step is taken: is `return` inside the loop?"
NOTHING_MOVED = "nothing moved: is the perturbed tensor returned?"
NETWORK_CHANGED = "an attack changes the image, never the network"


class Attack(NamedTuple):
    """Images under attack, and the settings of the attack."""

    x: Tensor  # (N, 3, 16, 16), normalised
    y: Tensor  # (N,)
    steps: int = 10
    size: float = 0.01
    eps: float = 0.1
    batch: int = 0  # that the loss is a mean over; 0: the images here


# ---- The network -----------------------------------------------------------------------------


class Network(nn.Sequential):
    """Records its inputs that require a gradient: the iterates of an attack."""

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        self.iterates: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, CLASSES) of images (N, 3, SIZE, SIZE)."""
        if x.requires_grad and torch.is_grad_enabled():
            self.iterates.append(x.detach().clone())
        return super().forward(x)


def untrained() -> Network:
    """BatchNorm and Dropout make the mode matter."""
    return Network(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(12 * SIZE * SIZE, CLASSES),
    )


@lru_cache(maxsize=1)
def trained() -> dict[str, Tensor]:
    """Weights with which the network is nearly always right.

    They are found in double precision, so that two processes find the same.
    """
    with fixed_state(0):
        net = untrained().double()
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for step in range(40):
            x, y = images(36, seed=1000 + step)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(net(x.double()), y).backward()
            optimizer.step()
        return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def fresh_model() -> Network:
    """The trained network, in float32 and evaluation mode."""
    net = untrained()
    net.load_state_dict(trained())
    return net.eval()


def images(n: int, seed: int, signal: float = 0.06) -> tuple[Tensor, Tensor]:
    """Normalised images of faint patterns in noise, (n, 3, 16, 16), within the range of pixels."""
    random = torch.Generator().manual_seed(6)
    patterns = torch.randn(CLASSES, 3, SIZE, SIZE, generator=random).sign()
    random.manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    noise = torch.randn(n, 3, SIZE, SIZE, generator=random)
    x = signal * patterns[labels] + 0.4 * noise
    return x.clamp(DARKEST + 0.25, BRIGHTEST - 0.25), labels


# ---- The student's attack and ours -----------------------------------------------------------


def perturb(code: ModuleType, net: nn.Module, attack: Attack) -> Tensor:
    """What the student's perturb returns; PGDAttack takes the settings by their names."""
    x = attack.x
    attacker = find(code, "PGDAttack")(
        nn.CrossEntropyLoss(), num_steps=attack.steps, step_size=attack.size, epsilon=attack.eps
    )
    x_adv = attacker.perturb(net, x.clone())
    if isinstance(x_adv, Tensor) and x_adv.shape == x.shape:
        return x_adv.detach()
    found = tuple(x_adv.shape) if isinstance(x_adv, Tensor) else type(x_adv).__name__
    raise CheckFailed(f"perturb gives {found} for images {tuple(x.shape)}")


def pgd(
    attack: Attack,
    *,
    sign: float = -1.0,
    pick: Callable[[Tensor], Tensor] = lambda logits: logits.argmin(1),
    again: bool = False,
    step: Callable[[Tensor], Tensor] = torch.sign,
    project: bool = True,
    clamp: tuple[Tensor | float, Tensor | float] | None = None,
    at_clean: bool = False,
    accumulate: bool = False,
    scale: Tensor | float = 1.0,
    steps: int | None = None,
) -> Tensor:
    """The assignment's attack (Kurakin et al., 2017); the keywords make it another, or wrong."""
    net, x, total = fresh_model().requires_grad_(False), attack.x, 0.0
    size, eps = attack.size * scale, attack.eps * scale
    x_adv, label = x, pick(net(x)).detach()
    for _ in range(attack.steps if steps is None else steps):
        point = (x if at_clean else x_adv).detach().requires_grad_(True)
        logits = net(point)
        loss = F.cross_entropy(logits, pick(logits) if again else label, reduction="sum")
        loss = loss / (attack.batch or len(x))
        (gradient,) = torch.autograd.grad(loss, point)
        total = gradient + (total if accumulate else 0.0)
        x_adv = x_adv.detach() + sign * size * step(total)
        if project:
            x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps)
        if clamp is not None:
            x_adv = torch.minimum(torch.maximum(x_adv, as_tensor(clamp[0])), as_tensor(clamp[1]))
    return x_adv.detach()


def as_tensor(value: Tensor | float) -> Tensor:
    """A bound for torch.minimum and torch.maximum."""
    return torch.as_tensor(value, dtype=torch.float)


def likeliest(logits: Tensor) -> Tensor:
    """The label that an untargeted attack leaves."""
    return logits.argmax(1)


def same(found: Tensor, expected: Tensor, share: float = 0.97) -> bool:
    """But for the few pixels whose gradient is so small that rounding decides its sign."""
    return bool(((found - expected).abs() < 1e-4).float().mean() > share)


def unmoved(found: Tensor, attack: Attack) -> bool:
    """Whether no pixel moved."""
    return (found - attack.x).abs().max().item() < 1e-7


WRONG_ATTACKS: Mapping[str, dict[str, Any]] = {
    WRONG_SIGN: {"sign": 1.0},
    UNTARGETED: {"sign": 1.0, "pick": likeliest},
    SURER: {"pick": likeliest},
    NO_SIGN: {"step": lambda gradient: gradient},
    ONE_STEP: {"steps": 1},
    NO_PROJECTION: {"project": False},
    NOT_NORMALISED: {"clamp": (0.0, 1.0)},
    PIXEL_UNITS: {"scale": 1 / STD},
    SCALED: {"scale": 1 / 255},
    CLEAN_GRADIENT: {"at_clean": True},
    ACCUMULATED: {"accumulate": True},
}


def wrong_attacks() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each known mistake, then every two of them."""
    yield from WRONG_ATTACKS.items()
    for (first, a), (second, b) in combinations(WRONG_ATTACKS.items(), 2):
        if not a.keys() & b.keys():
            yield f"{first}; and {second}", a | b


def likely_mistake(found: Tensor, attack: Attack) -> str:
    """The hint of the wrong attack that gives what was found, with a fixed label or a new one."""
    if unmoved(found, attack):
        return NOTHING_MOVED
    few = attack._replace(x=attack.x[:3], batch=len(attack.x))
    rights = [pgd(few, again=again) for again in (False, True)]
    for hint, kwargs in wrong_attacks():
        for again in (False, True):
            candidate = pgd(few, again=again, **kwargs)
            new = not any(same(candidate, right) for right in rights)
            if new and same(found[:3], candidate):
                return hint
    return ""


@torch.no_grad()
def target_losses(attack: Attack, *versions: Tensor) -> list[Tensor]:
    """The loss (N,) of the label least likely for the clean image, in each version of it."""
    net = fresh_model()
    target = net(attack.x).argmin(1)
    return [F.cross_entropy(net(v), target, reduction="none") for v in versions]


def expect_effect(found: Tensor, attack: Attack) -> None:
    """Raise CheckFailed for an attack that moves nothing, or as noise does."""
    clean, after, right = (
        losses.mean().item() for losses in target_losses(attack, attack.x, found, pgd(attack))
    )
    if not abs(after - clean) > 0.2 * abs(right - clean):  # noise: 0.12 in one of a hundred
        hint = likely_mistake(found, attack) or "move along the gradient of the loss"
        raise CheckFailed("the attack has no effect on the network's logits", hint)


def failed(problem: str, found: Tensor, attack: Attack) -> CheckFailed:
    """A failure with the hint of the mistake that gives what was found."""
    return CheckFailed(problem, likely_mistake(found, attack))


# ---- Within epsilon --------------------------------------------------------------------------

BALLS = ({}, {"eps": 0.1, "size": 0.03, "steps": 10}, {"eps": 0.02, "size": 0.01, "steps": 4})


def ball_attacks(seed: int) -> list[Attack]:
    """The default settings, others that leave the ball, and black and white pixels."""
    x, y = images(8, seed=10 * seed + 1)
    extreme = torch.where(x < -0.2, DARKEST, torch.where(x > 0.2, BRIGHTEST, x))
    return [Attack(x, y, **settings) for settings in BALLS] + [Attack(extreme, y)]


def probe_attacks(code: ModuleType, inputs: list[Attack]) -> Findings:
    """The adversarial images of each."""
    return {"found": [attempt(perturb, code, fresh_model(), attack) for attack in inputs]}


def judge_ball(inputs: list[Attack], findings: Findings) -> list[str]:
    """At most epsilon from the image, everywhere; and from images with black and white pixels."""
    *found, extreme = (value(finding, "perturb") for finding in findings["found"])
    for attack, x_adv in zip(inputs, found, strict=False):
        eps, moved = attack.eps, (x_adv - attack.x).abs()
        outside = (~(moved <= eps * (1 + 1e-4) + 1e-6)).nonzero()
        if len(outside):
            at = tuple(outside[0].tolist())
            raise failed(
                f"after {attack.steps} steps of {attack.size} the pixel at {at} is not within "
                f"epsilon: found {x_adv[at]:.5g}, expected {attack.x[at]:.5g} ± {eps}",
                x_adv,
                attack,
            )
        problem = f"no pixel moved, expected up to {eps} after {attack.steps} steps"
        expect(moved.max().item() > 0, problem, NOTHING_MOVED)
    expect_effect(found[0], inputs[0])
    if (extreme < DARKEST - 1e-4).any() or (extreme > BRIGHTEST + 1e-4).any():
        return [
            "pixels leave [0, 1]: no image file can hold such a sample; after each step, clamp to "
            "(0 - mean) / std and (1 - mean) / std (the skeleton asks for the ball alone)"
        ]
    return []


# ---- Direction and strength ------------------------------------------------------------------


def direction_attacks(seed: int) -> list[Attack]:
    """Steps that cross the ball from any start; steps large enough for the label to change."""
    x, y = images(24, seed=10 * seed + 2)
    return [Attack(x, y, steps=20), Attack(x, y, steps=8, size=0.05, eps=0.4)]


def judge_direction(inputs: list[Attack], findings: Findings) -> list[str]:
    """The loss of the label least likely for the clean image falls, half as far as in PGD."""
    attack, (found, large) = inputs[0], (value(one, "perturb") for one in findings["found"])
    clean, after, right = target_losses(attack, attack.x, found, pgd(attack))
    rises = (~(after < clean)).nonzero().flatten().tolist()
    fall, wanted = (clean - after).mean().item(), (clean - right).mean().item()
    if not (len(rises) <= 0.25 * len(clean) and fall > 0.5 * wanted):
        i = rises[0] if rises else 0
        raise failed(
            f"the loss of the least likely label does not fall as in PGD: it rises in {len(rises)} "
            f"of {len(clean)} images; in image {i} it was {clean[i].item():.4g}, found "
            f"{after[i].item():.4g}, expected about {right[i].item():.4g}",
            found,
            attack,
        )
    return changing_label(inputs[1], large)


def changing_label(attack: Attack, found: Tensor) -> list[str]:
    """A remark if the label is picked at each step."""
    for clamp in (None, (DARKEST, BRIGHTEST)):
        fixed, again = (pgd(attack, again=again, clamp=clamp) for again in (False, True))
        if same(found, again) and not same(found, fixed):
            return [
                "the least likely label is picked again at each step, which the handout allows; "
                "the attack is stronger if the label of the clean image stays fixed"
            ]
    return []


def strength_attacks(seed: int) -> list[Attack]:
    """Twenty steps."""
    return [Attack(*images(48, seed=10 * seed + 3), steps=20)]


@torch.no_grad()
def judge_strength(inputs: list[Attack], findings: Findings) -> None:
    """Far more predictions change than under noise of the same size."""
    (attack,), net = inputs, fresh_model()
    x, found = attack.x, value(findings["found"][0], "perturb")
    noise = attack.eps * torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).sign()
    clean = net(x).argmax(1)
    kept_noise, kept = (
        (net(v).argmax(1) == clean).float().mean().item() for v in (x + noise, found)
    )
    if not kept < kept_noise - 0.3:
        with torch.enable_grad():
            raise failed(
                f"noise of size epsilon leaves {kept_noise:.0%} of the predictions; after the "
                f"attack, found {kept:.0%}, expected below {kept_noise - 0.3:.0%}",
                found,
                attack,
            )


# ---- Steps -----------------------------------------------------------------------------------

MANY = (1, 4, 12)


def step_attacks(seed: int) -> list[Attack]:
    """One step, more, and one again."""
    x, y = images(48, seed=10 * seed + 5)
    return [Attack(x, y, steps=steps) for steps in (*MANY, 1)]


def probe_steps(code: ModuleType, inputs: list[Attack]) -> Findings:
    """The adversarial images, and the iterates at which their gradients were taken."""
    found = []
    for attack in inputs:
        net = fresh_model()
        x_adv = attempt(perturb, code, net, attack)
        found.append({"x_adv": x_adv, "iterates": net.iterates[-attack.steps - 2 :]})
    return {"found": found}


def judge_steps(inputs: list[Attack], findings: Findings) -> list[str]:
    """One step has the size asked for; more steps change more predictions."""
    found = [value(one["x_adv"], "perturb") for one in findings["found"]]
    one, _, most = found[:3]
    repeats = torch.equal(one, found[3])
    start = inputs[0].x
    if not repeats and len(iterates := findings["found"][0]["iterates"]) > 0:
        start = iterates[-1]
    judge_step_size(inputs[0], start, one)
    if same(one, most):
        hint = likely_mistake(most, inputs[2]) or ONE_STEP
        raise CheckFailed(f"{MANY[2]} steps do what 1 does", hint)
    with torch.no_grad():
        net = fresh_model()
        clean = net(inputs[0].x).argmax(1)
        changed = [(net(v).argmax(1) != clean).float().mean().item() for v in found[:3]]
    if not changed[0] <= changed[1] + 0.1 or not changed[1] <= changed[2] + 0.1:
        listed = ", ".join(f"{share:.0%}" for share in changed)
        problem = f"1, 4 and 12 steps change {listed} of the predictions: more steps are weaker"
        raise failed(problem, most, inputs[2])
    return [] if repeats else ["the attack starts at random points, which the handout allows"]


def judge_step_size(attack: Attack, start: Tensor, found: Tensor) -> None:
    """Of one step, whatever its direction; the projection shortens it at the ball's edge."""
    gradient_step = (pgd(attack, step=lambda gradient: gradient) - attack.x).abs()
    moved, right = (found - start).abs(), torch.full_like(found, attack.size)
    at_edge = (found - attack.x).abs() > 0.999 * attack.eps
    shortened = torch.where(at_edge, moved.clamp(max=attack.size), right)
    if same(moved, shortened, 0.85) and (moved > 0.99 * attack.size).float().mean() > 0.2:
        return
    if unmoved(found, attack):
        raise CheckFailed("a step moves no pixel", NOTHING_MOVED)
    hints = {
        f"{NO_SIGN}: l_inf steps are step_size × sign(gradient)": lambda: gradient_step,
        "a step has the size of epsilon, not of step_size": lambda: right * 10,
        PIXEL_UNITS: lambda: right / STD,
        SCALED: lambda: right / 255,
    }
    hint = likely_mistake(found, attack)
    compare("the distance that a step moves each pixel", moved, right, hints, hint=hint, tol=1e-2)


def iterate_attacks(seed: int) -> list[Attack]:
    """Steps enough to cross the ball, so that a random start is forgotten."""
    return [Attack(*images(24, seed=10 * seed + 8), steps=12, size=0.05, eps=0.25)]


def judge_iterates(inputs: list[Attack], findings: Findings) -> None:
    """The result is PGD's, or each iterate follows from the one before by the gradient there."""
    (attack,), (one,) = inputs, findings["found"]
    found = value(one["x_adv"], "perturb")
    clamps = (None, (DARKEST, BRIGHTEST))
    if any(same(found, pgd(attack, again=a, clamp=c)) for a in (False, True) for c in clamps):
        return
    path = [x for x in one["iterates"] if x.shape == found.shape] + [found]
    leaves = any((x - attack.x).abs().max() > 1.01 * attack.eps for x in path[1:-1])
    if leaves and (found - attack.x).abs().max() <= 1.01 * attack.eps:
        raise CheckFailed("iterates leave the ball, though the result does not", LATE_PROJECTION)
    steps = zip(path, path[1:], strict=False)
    right = sum(follows(attack, path[0], x, after) for x, after in steps)
    if right < attack.steps - 1:
        raise failed(
            f"{right} of {attack.steps} iterates follow from the one before by a step against the "
            "sign of the gradient there",
            found,
            attack,
        )


def follows(attack: Attack, start: Tensor, x: Tensor, after: Tensor) -> bool:
    """Whether `after` is one step from `x`, projected or not.

    The label is that of the clean image, of the start, or of `x`.
    """
    net = fresh_model().requires_grad_(False)
    targets = [net(v).argmin(1) for v in (attack.x, start, x)]
    for target in targets:
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(point), target), point)
        moved = x - attack.size * gradient.sign()
        projected = torch.clamp(moved, attack.x - attack.eps, attack.x + attack.eps)
        valid = torch.minimum(torch.maximum(projected, DARKEST), BRIGHTEST)
        if any(same(after, v, 0.95) for v in (moved, projected, valid)):
            return True
    return False


# ---- Side effects ----------------------------------------------------------------------------


def state_attack(seed: int) -> Attack:
    """Three steps."""
    return Attack(*images(6, seed=10 * seed + 6), steps=3)


def probe_state(code: ModuleType, attack: Attack) -> Findings:
    """The network and the images after an attack, in evaluation and training mode."""
    return {
        mode: attempt(state_after, code, attack, mode == "training")
        for mode in ("evaluation", "training")
    }


def state_after(code: ModuleType, attack: Attack, training: bool) -> Findings:
    """The state after one call of perturb."""
    net, given = fresh_model().train(training), attack.x.clone()
    attacker = find(code, "PGDAttack")(nn.CrossEntropyLoss(), num_steps=attack.steps)
    x_adv = attacker.perturb(net, given)
    return {
        "x_adv": x_adv,
        "given": given,
        "network": net.state_dict(),
        "frozen": [name for name, p in net.named_parameters() if not p.requires_grad],
        "modes": [module.training for module in net.modules()],
    }


def judge_state(attack: Attack, findings: Findings) -> list[str]:
    """Weights, modes and the caller's images are as before."""
    remarks, before = [], fresh_model()
    buffers = {name for name, _ in before.named_buffers()}
    for mode in ("evaluation", "training"):
        found = value(findings[mode], f"in {mode} mode perturb")
        hint = "the caller's images are changed in place: clone them first"
        compare("the input, after the attack", found["given"], attack.x, hint=hint, tol=1e-7)
        changed = []
        for name, tensor in before.state_dict().items():
            if name in buffers:
                changed += [] if torch.equal(found["network"][name], tensor) else [name]
                continue
            what = f"{name}, after the attack"
            compare(what, found["network"][name], tensor, hint=NETWORK_CHANGED, tol=1e-7)
        frozen = found["frozen"]
        problem = f"after the attack requires_grad is False for {', '.join(frozen[:2])}"
        expect(not frozen, problem, f"{NETWORK_CHANGED}: set requires_grad back")
        problem = f"the network was in {mode} mode and is not now"
        hint = "after model.eval() in perturb, go back to the mode that was found"
        expect(set(found["modes"]) == {mode == "training"}, problem, hint)
        if changed:
            remarks.append(f"in {mode} mode the attack changes {changed[0]}: use model.eval()")
        if mode == "evaluation":
            expect_effect(found["x_adv"], attack)
    return remarks


def training_attack(seed: int) -> Attack:
    """Three steps."""
    return Attack(*images(12, seed=10 * seed + 7), steps=3)


def probe_training(code: ModuleType, attack: Attack) -> Findings:
    """The parameters' gradients after an attack, and which parameters require one."""
    net = fresh_model()
    x_adv = perturb(code, net, attack)
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    left = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"x_adv": x_adv, "frozen": frozen, "left": left}


def judge_training(attack: Attack, findings: Findings) -> None:
    """A step of adversarial training uses the gradient of its loss only."""
    expect_effect(findings["x_adv"], attack)
    frozen = findings["frozen"]
    problem = f"after the attack {len(frozen)} parameters are frozen, first {frozen[:1]}"
    hint = "perturb sets requires_grad to False on the network: set it back before it returns"
    expect(not frozen, problem, hint)
    net = fresh_model()
    F.cross_entropy(net(findings["x_adv"]), attack.y).backward()
    hint = (
        "parameter gradients are left behind and reach the training step: use torch.autograd.grad "
        "for the images alone, or zero_grad() at the end of perturb"
    )
    for name, parameter in net.named_parameters():
        rest = findings["left"].get(name)
        if isinstance(rest, Tensor) and rest.any():
            what = f"the gradient of {name} in adversarial training"
            compare(what, parameter.grad + rest, parameter.grad, hint=hint)


HANDOUT = "handout, part III: adversarial samples by PGD towards the least likely label"
NETWORK = "a small network of ours"

CHECKS = (
    Check(
        "attack",
        0.25,
        "stays within epsilon",
        probe_attacks,
        judge_ball,
        f"every pixel at most epsilon from the image, for three settings, on {NETWORK}; samples "
        f"that leave [0, 1] are a remark ({HANDOUT})",
        ball_attacks,
    ),
    Check(
        "attack",
        0.375,
        "approaches the least likely label",
        probe_attacks,
        judge_direction,
        "the loss of the label that is least likely for the clean image falls in three of four "
        f"images, and on average half as far as under our PGD ({HANDOUT})",
        direction_attacks,
    ),
    Check(
        "attack",
        0.25,
        "stronger than noise",
        probe_attacks,
        judge_strength,
        "twenty steps change 30 % more of the predictions than random signs of size epsilon "
        f"({HANDOUT})",
        strength_attacks,
    ),
    Check(
        "attack",
        0.375,
        "steps: their size, more of them",
        probe_steps,
        judge_steps,
        f"one step moves pixels by step_size; 1, 4 and 12 steps are ever stronger ({HANDOUT})",
        step_attacks,
    ),
    Check(
        "attack",
        0.25,
        "each step at the current iterate",
        probe_steps,
        judge_iterates,
        "the result of 12 large steps is that of PGD, or each iterate follows from the one before "
        f"by a step against the sign of the gradient there ({HANDOUT})",
        iterate_attacks,
    ),
    Check(
        "attack",
        0.25,
        "network and images as before",
        probe_state,
        judge_state,
        "weights, requires_grad, modes and the caller's images after an attack, in evaluation and "
        f"training mode ({HANDOUT}: the network is evaluated afterwards)",
        state_attack,
    ),
    Check(
        "attack",
        0.25,
        "fit for adversarial training (the bonus)",
        probe_training,
        judge_training,
        "an attack leaves no gradients in the network's parameters and all of them trainable "
        "(handout: the bonus trains on adversarial samples)",
        training_attack,
    ),
)
