"""Part II: the vision transformer in training, and networks restored from a checkpoint."""

from __future__ import annotations

import inspect
import io
from types import ModuleType
from typing import Any

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
    value,
)

CLASSES, ROUNDS, STEPS = 6, 4, 10
REGION = 16  # pixels: the image is 8 x 8 regions
DEPTH, WINDOWED = 3, ((1,), (0, 2))  # settings of window_block_indexes
STORED = "what it learns must be in state_dict(): nn.ModuleList, nn.Parameter, register_buffer"


def build(code: ModuleType) -> nn.Module:
    """The student's ViT."""
    find(code, "SimpleViT")
    return find(code, "default_vit_model")(num_classes=CLASSES)


def images(n: int, seed: int) -> Tensor:
    """Images (n, 3, 128, 128), each with another coarse pattern."""
    random = torch.Generator().manual_seed(seed)
    patterns = torch.randn(n, 3, 8, 8, generator=random)
    return F.interpolate(patterns, size=128) + 0.1 * torch.randn(n, 3, 128, 128, generator=random)


def few_images(seed: int) -> Tensor:
    """One image of each class."""
    return images(CLASSES, seed)


def train(net: nn.Module, x: Tensor, steps: int) -> None:
    """AdamW as in the assignment; each image is its own class."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(steps):
        loss = F.cross_entropy(net(x), torch.arange(len(x)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


# ---- Shapes ----------------------------------------------------------------------------------


@torch.no_grad()
def probe_shapes(code: ModuleType, x: Tensor) -> Findings:
    """Logits of a batch, of its first image alone, and of the batch once more."""
    net = build(code).eval()
    return {"batch": net(x[:3]), "alone": attempt(net, x[:1]), "again": net(x[:3])}


def judge_shapes(x: Tensor, findings: Findings) -> None:
    """An image has the same logits alone, among others, and in a second run."""
    batch, alone = findings["batch"], value(findings["alone"], "one image alone")
    for found, n in ((batch, 3), (alone, 1)):
        shape = tuple(found.shape) if isinstance(found, Tensor) else found
        problem = f"logits of {n} images: shape {shape}, expected {(n, CLASSES)}"
        expect(shape == (n, CLASSES), problem)
    what = "the logits of an image among others, against those of it alone"
    compare(what, batch[:1], alone, tol=1e-3)
    compare("the logits of a second run in eval mode", findings["again"], batch, tol=1e-5)


# ---- What the logits depend on ---------------------------------------------------------------


def probe_receptive_field(code: ModuleType, x: Tensor) -> Findings:
    """The logits' gradient for the pixels after some steps; what other settings change."""
    net = build(code)
    train(net, x, 3)  # a last layer that starts at zero would hide the image
    x = x.clone().requires_grad_()
    logits = net.eval()(x)
    weights = torch.linspace(-1, 1.5, CLASSES)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), x, allow_unused=True)
    return {"gradient": gradient, "settings": attempt(other_settings, code, x.detach())}


@torch.no_grad()
def other_settings(code: ModuleType, x: Tensor) -> Findings:
    """How many sequences of tokens each qkv gets, and logits with a high drop_path_rate."""
    model = find(code, "SimpleViT")
    names, found = inspect.signature(model.__init__).parameters, {}
    if {"depth", "window_size", "window_block_indexes"} <= set(names):
        for indexes in WINDOWED:
            net = model(
                num_classes=CLASSES, depth=DEPTH, window_size=2, window_block_indexes=indexes
            )
            found[str(indexes)] = sequences(net.eval(), x[:1])
    if {"depth", "drop_path_rate"} <= set(names):
        net = model(num_classes=CLASSES, depth=DEPTH, drop_path_rate=0.9).train()
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # a layer may start at zero
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.eval()  # it is no stochastic depth
        found["dropped"] = torch.cat([net(x[:1]) for _ in range(16)])
    return found


def sequences(net: nn.Module, image: Tensor) -> list[int]:
    """The length of the batch axis at each call of a module that holds a qkv: windows count."""
    lengths: list[int] = []
    for module in net.modules():
        block = any(isinstance(child, nn.LayerNorm) for child in module.children())
        if hasattr(module, "qkv") and not block:
            module.register_forward_pre_hook(lambda _, inputs: lengths.extend(map(len, inputs[:1])))
    net(image)
    return lengths


def judge_receptive_field(x: Tensor, findings: Findings) -> None:
    """Every region of the image counts; windows are where they were asked for; drop path acts."""
    gradient = findings["gradient"]
    expect(isinstance(gradient, Tensor), "the logits do not depend on the image")
    colours = gradient.abs().sum((0, 2, 3))
    problem = f"the logits depend on {int((colours > 0).sum())} of the image's 3 channels"
    expect(bool((colours > 0).all()), problem, "give all channels to the patch embedding")
    seen = F.avg_pool2d(gradient.abs().double(), REGION).sum((0, 1))  # (8, 8)
    blind = ~(seen > 1e-7 * seen.max())
    if blind.any():
        i, j = blind.nonzero()[0].tolist()
        raise CheckFailed(
            f"the logits do not depend on {blind.double().mean():.0%} of the image, first on the "
            f"pixels from row {REGION * i}, column {REGION * j}",
            "average over all tokens; blocks without windows attend to all of them",
        )
    settings = value(findings["settings"], "SimpleViT with depth=3")
    for indexes in WINDOWED:
        judge_windows(indexes, settings.get(str(indexes), []))
    if "dropped" in settings:
        spread = settings["dropped"].std(0).max().item()
        problem = "drop_path_rate=0.9 drops nothing in training mode"
        expect(spread > 1e-6, problem, "give each block its rate: drop_path=...")


def judge_windows(indexes: tuple[int, ...], lengths: list[int]) -> None:
    """The blocks named by window_block_indexes attend within windows, the others globally."""
    if len(lengths) != DEPTH:
        return  # qkv is called in another way: nothing can be said
    windowed = tuple(i for i, length in enumerate(lengths) if length > 1)
    problem = f"window_block_indexes={indexes} of {DEPTH} blocks: windowed are {windowed}"
    hint = "window_size if i in window_block_indexes else 0"
    expect(windowed == indexes, problem, hint)


# ---- Parameters and learning -----------------------------------------------------------------


def probe_parameters(code: ModuleType, x: Tensor) -> Findings:
    """The largest gradient of each parameter after some steps (before, a zero may hide others)."""
    net = build(code)
    train(net, x, 3)
    net.eval()
    net.zero_grad(set_to_none=True)
    logits = net(x)
    F.cross_entropy(logits, torch.arange(len(x))).backward()
    trainable = {n: p for n, p in net.named_parameters() if p.requires_grad}
    largest = {n: 0.0 if p.grad is None else p.grad.abs().max() for n, p in trainable.items()}
    return {"largest": largest, "logits": logits}


def judge_parameters(x: Tensor, findings: Findings) -> None:
    """None is without a gradient."""
    expect_logits(findings["logits"], len(x))
    largest = findings["largest"]
    expect(bool(largest), "SimpleViT has no parameters")
    unused = [name for name, gradient in largest.items() if not float(gradient) > 0]
    hint = "it is made in __init__ but takes no part in forward, or the graph is cut behind it"
    names = ", ".join(unused[:4]) + ("" if len(unused) <= 4 else f" and {len(unused) - 4} more")
    expect(not unused, f"no gradient reaches {len(unused)} parameters: {names}", hint)


def expect_logits(logits: object, n: int) -> None:
    """Raise CheckFailed unless these are logits (n, CLASSES) for different images."""
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else logits
    expect(shape == (n, CLASSES), f"logits of {n} images: shape {shape}, expected {(n, CLASSES)}")


def probe_learning(code: ModuleType, x: Tensor) -> Findings:
    """The logits before, and after every few steps until they fit the images."""
    net = build(code)
    logits = [evaluate(net, x)]
    while len(logits) <= ROUNDS and loss_of(logits[-1]) >= 0.4 * loss_of(logits[0]):
        train(net, x, STEPS)
        logits.append(evaluate(net, x))
    return {"logits": logits}


@torch.no_grad()
def evaluate(net: nn.Module, x: Tensor) -> Tensor:
    """Logits in evaluation mode."""
    return net.eval()(x)


def loss_of(logits: Tensor) -> float:
    """Cross-entropy, each image being its own class."""
    return F.cross_entropy(logits, torch.arange(len(logits))).item()


def judge_learning(x: Tensor, findings: Findings) -> None:
    """A few images are overfitted in a few steps: the loss falls to less than half."""
    for logits in findings["logits"]:
        expect_logits(logits, len(x))
    losses = [loss_of(logits) for logits in findings["logits"]]
    listed = ", ".join(f"{loss:.3f}" for loss in losses)
    expect(
        losses[-1] < 0.5 * losses[0],
        f"trained on {len(x)} images, the loss after every {STEPS} steps is {listed}: found "
        f"{losses[-1]:.3f}, expected below {losses[0] / 2:.3f}",
        learning_hint(findings["logits"][-1]),
    )


def learning_hint(logits: Tensor) -> str:
    """Why the loss does not fall."""
    if logits.std(0).max().item() < 1e-3:
        return "all images get the same logits: what distinguishes them is lost on the way"
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones(len(logits)), atol=1e-4):
        return "the network ends in a softmax: the loss takes logits"
    return ""


# ---- Checkpoint ------------------------------------------------------------------------------


@torch.no_grad()
def probe_checkpoint(code: ModuleType, x: Tensor) -> Findings:
    """Logits of each network, and of a new one with its saved weights."""
    return {
        name: attempt(save_and_load, find(code, name), x[:2])
        for name in ("default_cnn_model", "default_vit_model")
    }


def save_and_load(build_network: Any, x: Tensor) -> list[Tensor]:
    """Save the weights, load them as data only (weights_only), put them into a new network."""
    net = build_network(num_classes=CLASSES).eval()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    torch.rand(1)  # the new network starts from other random numbers
    copy = build_network(num_classes=CLASSES).eval()
    copy.load_state_dict(torch.load(file, weights_only=True))
    return [copy(x.clone()), net(x.clone())]


def judge_checkpoint(x: Tensor, findings: Findings) -> None:
    """Both give the same logits."""
    for name in ("default_cnn_model", "default_vit_model"):
        loaded, saved = value(findings[name], name)
        expect_logits(saved, 2)
        compare(f"the logits of a {name} that was saved and loaded", loaded, saved, hint=STORED)


HANDOUT = "handout, part II: implement and train the vision transformer"

CHECKS = (
    Check(
        "vit",
        0.25,
        "shapes, one image or many",
        probe_shapes,
        judge_shapes,
        f"logits (N, num_classes) of default_vit_model; an image has the same alone ({HANDOUT})",
        few_images,
    ),
    Check(
        "vit",
        0.25,
        "the whole image, windows, drop path",
        probe_receptive_field,
        judge_receptive_field,
        "the logits depend on every part of the image; where SimpleViT takes window_block_indexes "
        f"and drop_path_rate, they act ({HANDOUT})",
        few_images,
    ),
    Check(
        "vit",
        0.25,
        "every parameter is used",
        probe_parameters,
        judge_parameters,
        f"after three steps of AdamW a gradient reaches each parameter ({HANDOUT})",
        few_images,
    ),
    Check(
        "vit",
        0.25,
        "learns a small batch",
        probe_learning,
        judge_learning,
        f"the loss of six images falls to less than half within 40 steps of AdamW ({HANDOUT})",
        few_images,
    ),
    Check(
        "vit",
        0.25,
        "networks survive a checkpoint",
        probe_checkpoint,
        judge_checkpoint,
        "the CNN and the ViT, saved and loaded with weights_only, give the same logits (handout: "
        "evaluate with --resume)",
        few_images,
    ),
)
