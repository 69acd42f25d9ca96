"""Part III: PGDAttack on a small network trained for the purpose, beside right and wrong attacks.

The handout asks for the ball, not for the range of valid pixels, and lets the label be picked anew
at each step: a missing clamp, a changing label or a random start is a remark.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks.grading import CheckFailed, Mistakes, compare, expect, find

CLASSES, SIZE = 6, 16
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
DARKEST, BRIGHTEST = -MEAN / STD, (1 - MEAN) / STD

WRONG_SIGN = "wrong sign: it climbs the loss of the least likely label; step against the gradient"
UNTARGETED = "it climbs the loss of the likeliest label: the assignment descends the least likely's"
SURER = "wrong sign and label: it makes the network surer of what it sees"
PIXEL_UNITS = "step_size and epsilon are divided by std: they are in units of the normalised input"
DEFAULTS = {"eps": 0.1, "size": 0.01}
RANDOM_START = "a random start is fine; the size of a step is then not checked"


def images(n: int, seed: int, signal: float = 0.06) -> tuple[Tensor, Tensor]:
    """Normalised images of faint patterns in noise, (n, 3, 16, 16), within the range of pixels."""
    random = torch.Generator().manual_seed(6)
    patterns = torch.randn(CLASSES, 3, SIZE, SIZE, generator=random).sign()
    random.manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    noise = torch.randn(n, 3, SIZE, SIZE, generator=random)
    x = signal * patterns[labels] + 0.4 * noise
    return x.clamp(DARKEST + 0.25, BRIGHTEST - 0.25), labels


@lru_cache(maxsize=1)
def trained() -> nn.Module:
    """A network that is nearly always right, with BatchNorm and Dropout: modes matter."""
    random = torch.random.get_rng_state()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(12 * SIZE * SIZE, CLASSES),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for step in range(40):
        x, y = images(36, seed=1000 + step)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.random.set_rng_state(random)
    return net.eval()


def victim() -> nn.Module:
    return copy.deepcopy(trained())


def perturb(
    code: ModuleType,
    net: nn.Module,
    x: Tensor,
    steps: int = 10,
    size: float = 0.01,
    eps: float = 0.1,
) -> Tensor:
    attack = find(code, "PGDAttack")(
        nn.CrossEntropyLoss(), num_steps=steps, step_size=size, epsilon=eps
    )
    x_adv = attack.perturb(net, x.clone())
    if isinstance(x_adv, Tensor) and x_adv.shape == x.shape:
        return x_adv.detach()
    found = tuple(x_adv.shape) if isinstance(x_adv, Tensor) else type(x_adv).__name__
    raise CheckFailed(f"perturb gives {found} for images {tuple(x.shape)}")


def pgd(
    net: nn.Module,
    x: Tensor,
    steps: int = 10,
    size: float = 0.01,
    eps: float = 0.1,
    *,
    sign: float = -1.0,
    pick: Callable[[Tensor], Tensor] = lambda logits: logits.argmin(1),
    again: bool = False,
    step: Callable[[Tensor], Tensor] = torch.sign,
    project: bool = True,
    clamp: tuple[Tensor | float, Tensor | float] | None = None,
) -> Tensor:
    """The assignment's attack (Kurakin et al., 2017); the keywords make it another, or wrong."""
    x_adv, label = x, pick(net(x)).detach()
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_(True)
        logits = net(x_adv)
        loss = F.cross_entropy(logits, pick(logits) if again else label)
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + sign * size * step(gradient)
        if project:
            x_adv = x + (x_adv - x).clamp(-eps, eps)
        if clamp is not None:
            x_adv = torch.minimum(torch.maximum(x_adv, as_tensor(clamp[0])), as_tensor(clamp[1]))
    return x_adv.detach()


def as_tensor(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float)


def likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(1)


def same(found: Tensor, expected: Tensor) -> bool:
    """But for the few pixels whose gradient is so small that rounding decides its sign."""
    return bool(((found - expected).abs() < 1e-4).float().mean() > 0.97)


def likely_mistake(found: Tensor, net: nn.Module, x: Tensor, **sizes: float) -> str:
    """The hint of the wrong attack that gives what was found."""
    wrong = {
        WRONG_SIGN: {"sign": 1.0},
        UNTARGETED: {"sign": 1.0, "pick": likeliest},
        SURER: {"sign": -1.0, "pick": likeliest},
        "the gradient's sign is not taken": {"step": lambda g: g},
        "only one step is taken: is `return` inside the loop?": {"steps": 1},
        "the ball's projection is missing: keep x_adv within epsilon of the input": (
            {"project": False}
        ),
        "pixels are clamped to [0, 1], but the input is normalised": {"clamp": (0.0, 1.0)},
        PIXEL_UNITS: {name: sizes.get(name, default) / STD for name, default in DEFAULTS.items()},
    }
    for again in (False, True):
        right = pgd(net, x, again=again, **sizes)
        for hint, kwargs in wrong.items():
            candidate = pgd(net, x, again=again, **(sizes | kwargs))
            if same(found, candidate) and not same(candidate, right):
                return hint
    return "nothing moved" if same(found, x) else ""


# ---- Checks ----------------------------------------------------------------------------------


def check_ball(code: ModuleType) -> list[str]:
    """At most epsilon from the image, everywhere; and from images with black and white pixels."""
    net = victim()
    x, _ = images(8, seed=1)
    for eps, size, steps in ((0.1, 0.03, 10), (0.02, 0.01, 4)):
        sizes = {"eps": eps, "size": size, "steps": steps}
        found = perturb(code, net, x, **sizes)
        moved = (found - x).abs()
        outside = (~(moved <= eps * (1 + 1e-4))).nonzero()
        if len(outside):
            at = tuple(outside[0].tolist())
            raise CheckFailed(
                f"after {steps} steps of {size} the pixel at {at} is not within epsilon: "
                f"found {found[at].item():.5g}, expected {x[at].item():.5g} ± {eps}",
                likely_mistake(found, net, x, **sizes),
            )
        problem = f"no pixel moved, expected up to {eps} after {steps} steps of {size}"
        expect(moved.max().item() > 0, problem, "is the perturbed tensor returned?")
    x = torch.where(x < -0.2, DARKEST, torch.where(x > 0.2, BRIGHTEST, x))
    x_adv = perturb(code, net, x)
    if (x_adv < DARKEST - 1e-4).any() or (x_adv > BRIGHTEST + 1e-4).any():
        return [
            "pixels leave [0, 1]: no image file can hold such a sample; after each step, clamp to "
            "(0 - mean) / std and (1 - mean) / std (the skeleton asks for the ball alone)"
        ]
    return []


def check_direction(code: ModuleType) -> list[str]:
    """The loss of the label least likely for the clean image falls, for every image."""
    net, (x, _) = victim(), images(24, seed=2)
    target = net(x).argmin(1)
    found = perturb(code, net, x)
    with torch.no_grad():
        clean, after = (F.cross_entropy(net(v), target, reduction="none") for v in (x, found))
    right = F.cross_entropy(net(pgd(net, x)), target, reduction="none").detach()
    failed = (~(after < clean)).nonzero().flatten().tolist()
    if failed:
        i = failed[0]
        raise CheckFailed(
            f"the loss of the least likely label does not fall: in {len(failed)} of {len(x)} "
            f"images, first in {i}: it was {clean[i].item():.4g}, found {after[i].item():.4g}, "
            f"expected about {right[i].item():.4g}",
            likely_mistake(found, net, x),
        )
    return changing_label(code, net, x)


def changing_label(code: ModuleType, net: nn.Module, x: Tensor) -> list[str]:
    """A remark if the label is picked anew: told from steps large enough to make it change."""
    sizes = {"steps": 8, "size": 0.05, "eps": 0.4}
    found = perturb(code, net, x, **sizes)
    for clamp in (None, (DARKEST, BRIGHTEST)):
        fixed, anew = (pgd(net, x, again=again, clamp=clamp, **sizes) for again in (False, True))
        if same(found, anew) and not same(found, fixed):
            return [
                "the least likely label is picked anew at each step, which the handout allows; the "
                "attack is stronger if the label of the clean image stays fixed"
            ]
    return []


def check_strength(code: ModuleType) -> None:
    """Far more predictions change than under noise of the same size."""
    net, (x, _) = victim(), images(48, seed=3)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).sign()
    found = perturb(code, net, x, steps=20)
    clean = net(x).argmax(1)
    kept_noise = (net(x + 0.1 * noise).argmax(1) == clean).float().mean().item()
    kept = (net(found).argmax(1) == clean).float().mean().item()
    if not kept < kept_noise - 0.3:
        raise CheckFailed(
            f"noise of size epsilon leaves {kept_noise:.0%} of the predictions; after the attack, "
            f"found {kept:.0%}, expected below {kept_noise - 0.3:.0%}",
            likely_mistake(found, net, x, steps=20),
        )


def check_steps(code: ModuleType) -> list[str]:
    """One step has the size asked for; more steps change more predictions."""
    net, (x, _) = victim(), images(48, seed=5)
    clean, changed, attacked = net(x).argmax(1), [], []
    for steps in (1, 4, 12):
        attacked.append(perturb(code, net, x, steps=steps))
        changed.append((net(attacked[-1]).argmax(1) != clean).float().mean().item())
    repeats = torch.equal(attacked[0], perturb(code, net, x, steps=1))
    if repeats:
        check_step_size(net, x, attacked[0])
    if same(attacked[0], attacked[2]):
        raise CheckFailed("12 steps do what 1 does", likely_mistake(attacked[2], net, x, steps=12))
    told = ", ".join(f"{share:.0%}" for share in changed)
    weaker = f"1, 4 and 12 steps change {told} of the predictions: more steps are weaker"
    expect(changed[0] <= changed[1] + 0.1 and changed[1] <= changed[2] + 0.1, weaker)
    return [] if repeats else [RANDOM_START]


def check_step_size(net: nn.Module, x: Tensor, found: Tensor) -> None:
    """Of the first step, whatever its direction."""
    moved, right = ((v - x).abs() for v in (found, pgd(net, x, steps=1)))
    hints: Mistakes = {
        "the gradient's sign is not taken: l_inf steps are step_size × sign(gradient)": (
            lambda: (pgd(net, x, steps=1, step=lambda g: g) - x).abs()
        ),
        "a step has the size of epsilon, not of step_size": lambda: right * 10,
        PIXEL_UNITS: lambda: right / STD,
    }
    if not same(moved, right):
        compare("the distance that a step moves each pixel", moved, right, hints, tol=1e-2)


def check_state(code: ModuleType) -> list[str]:
    """Weights, modes and the caller's images are as before, in evaluation and training mode."""
    remarks = []
    for training in (False, True):
        net, (x, _) = victim().train(training), images(6, seed=6)
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        given = x.clone()
        attack = find(code, "PGDAttack")(nn.CrossEntropyLoss(), num_steps=3)
        attack.perturb(net, given)
        hint = "the caller's images are changed in place: clone them first"
        compare("the input, after the attack", given, x, hint=hint, tol=1e-7)
        for name, parameter in net.named_parameters():
            hint = "an attack changes the image, never the network"
            compare(f"{name}, after the attack", parameter, before[name], hint=hint, tol=1e-7)
            expect(parameter.requires_grad, f"{name} no longer wants a gradient", hint)
        mode = f"the network was in {'training' if training else 'evaluation'} mode and is not now"
        hint = "after model.eval() in perturb, go back to the mode that was found"
        expect(all(module.training == training for module in net.modules()), mode, hint)
        moved = [n for n, b in net.named_buffers() if not torch.equal(b, before[n])]
        if moved:
            remarks.append(f"in training mode the attack changes {moved[0]}: use model.eval()")
    return remarks


def check_training(code: ModuleType) -> None:
    """Bonus: a step of adversarial training sees the gradient of its own loss, and nothing else."""
    net, (x, y) = victim(), images(12, seed=7)
    x_adv = perturb(code, net, x, steps=3)
    left = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    F.cross_entropy(net(x_adv), y).backward()
    hint = (
        "parameter gradients are left behind and reach the training step: use torch.autograd.grad "
        "for the images alone, or zero_grad() at the end of perturb"
    )
    for (name, parameter), rest in zip(net.named_parameters(), left, strict=True):
        if rest is not None and rest.any():
            what = f"the gradient of {name} in adversarial training"
            compare(what, parameter.grad + rest, parameter.grad, hint=hint)
