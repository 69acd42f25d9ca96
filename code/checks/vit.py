"""Part II: the vision transformer that trains, and networks that come back from a checkpoint."""

from __future__ import annotations

import io
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks.grading import compare, expect, find

CLASSES, ROUNDS = 6, 4


def make(code: ModuleType) -> nn.Module:
    return find(code, "default_vit_model")(num_classes=CLASSES)


def images(n: int) -> Tensor:
    """Images (n, 3, 128, 128), each with a coarse pattern of its own."""
    random = torch.Generator().manual_seed(8)
    patterns = torch.randn(n, 3, 8, 8, generator=random)
    return F.interpolate(patterns, size=128) + 0.1 * torch.randn(n, 3, 128, 128, generator=random)


@torch.no_grad()
def check_shapes(code: ModuleType) -> None:
    find(code, "SimpleViT")
    net, x = make(code).eval(), images(3)
    for batch in (x, x[:1]):
        found, right = tuple(net(batch).shape), (len(batch), CLASSES)
        problem = f"logits of {len(batch)} images: shape {found}, expected {right}"
        expect(found == right, problem)
    together, alone = net(x)[:1], net(x[:1])
    what = "the logits of an image among others, beside those of it alone"
    compare(what, together, alone, tol=1e-3)
    again = net(x)[:1]
    compare("the logits of a second run in eval mode", again, together, tol=1e-6)


def check_parameters(code: ModuleType) -> None:
    """After some steps each parameter has a gradient (before, a zero may hide those behind it)."""
    torch.manual_seed(1)
    net, x = make(code), images(CLASSES)
    train(net, x, 3)
    net.eval()
    net.zero_grad(set_to_none=True)
    F.cross_entropy(net(x), torch.arange(len(x))).backward()
    trainable = {n: p for n, p in net.named_parameters() if p.requires_grad}
    expect(bool(trainable), "SimpleViT has no parameters")
    unused = [n for n, p in trainable.items() if p.grad is None or not p.grad.any()]
    hint = "it is made in __init__ but takes no part in forward, or the graph is cut behind it"
    names = ", ".join(unused[:4]) + ("" if len(unused) <= 4 else f" and {len(unused) - 4} more")
    expect(not unused, f"no gradient reaches {len(unused)} parameters: {names}", hint)


def train(net: nn.Module, x: Tensor, steps: int) -> None:
    """AdamW as in the assignment; each image is a class of its own."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(steps):
        loss = F.cross_entropy(net(x), torch.arange(len(x)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def check_learning(code: ModuleType) -> None:
    """A few images by heart, in a few steps: the loss falls to less than half."""
    torch.manual_seed(2)
    net, x = make(code), images(CLASSES)
    losses = [loss_of(net, x)]
    while len(losses) <= ROUNDS and losses[-1] >= 0.5 * losses[0]:
        train(net, x, 10)
        losses.append(loss_of(net, x))
    told = ", ".join(f"{loss:.3f}" for loss in losses)
    same = "all images get the same logits: what tells them apart is lost on the way"
    expect(
        losses[-1] < 0.5 * losses[0],
        f"trained on {len(x)} images, the loss after every 10 steps is {told}: found "
        f"{losses[-1]:.3f}, expected below {losses[0] / 2:.3f}",
        same if differs_little(net, x) else "",
    )


@torch.no_grad()
def loss_of(net: nn.Module, x: Tensor) -> float:
    return F.cross_entropy(net.eval()(x), torch.arange(len(x))).item()


@torch.no_grad()
def differs_little(net: nn.Module, x: Tensor) -> bool:
    return net(x).std(0).max().item() < 1e-3


@torch.no_grad()
def check_checkpoint(code: ModuleType) -> None:
    """Saved, loaded as data alone (weights_only), put into a new network: the same logits."""
    for name in ("default_cnn_model", "default_vit_model"):
        build, x = find(code, name), images(2)
        torch.manual_seed(3)
        net = build(num_classes=CLASSES).eval()
        file = io.BytesIO()
        torch.save(net.state_dict(), file)
        file.seek(0)
        torch.manual_seed(4)
        copy = build(num_classes=CLASSES).eval()
        copy.load_state_dict(torch.load(file, weights_only=True))
        found, right = copy(x), net(x)
        hint = (
            "what it learns must be in state_dict(): nn.ModuleList, nn.Parameter, register_buffer"
        )
        what = f"the logits of a {name} that was saved and loaded"
        compare(what, found, right, hint=hint)
