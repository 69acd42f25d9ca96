"""Part II: multi-head self-attention, against its definition in double precision."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks.grading import CUT, Mistakes, compare, expect, find

# (dim, num_heads, qkv_bias, H, W)
CASES = [(12, 3, True, 3, 4), (16, 2, False, 5, 2), (8, 1, True, 2, 3), (24, 4, True, 9, 8)]

SQRT_D = "the scale is forgotten: divide q kᵀ by the square root of head_dim"
ORDER = "wrong head order: the output of qkv is (3, num_heads, head_dim), here it is read as {}"

# What is done instead of attention, by the hint that it deserves
MISTAKES = {
    SQRT_D: {"power": 0.0},
    "q kᵀ is divided by head_dim, not by its square root": {"power": -1.0},
    "q kᵀ is multiplied by the square root of head_dim: divide": {"power": 0.5},
    "the scale is the square root of dim: it is that of head_dim, dim / num_heads": {"whole": True},
    ORDER.format("(num_heads, 3, head_dim)"): {"layout": "h3d"},
    ORDER.format("(num_heads, head_dim, 3)"): {"layout": "hd3"},
    ORDER.format("(3, head_dim, num_heads)"): {"layout": "3dh"},
    "wrong head order: the output's heads are joined before (heads, N) is transposed": (
        {"transpose": False}
    ),
    "the softmax runs over the queries: it runs over the keys, dim=-1": {"over": -2},
    "the softmax runs over the heads: it runs over the keys, dim=-1": {"over": 1},
    "the softmax is missing": {"over": None},
    "q and k are swapped": {"order": (1, 0, 2)},
    "k and v are swapped": {"order": (0, 2, 1)},
    "q and v are swapped": {"order": (2, 1, 0)},
    "q, k, v are taken in the order k, v, q": {"order": (1, 2, 0)},
    "q, k, v are taken in the order v, q, k": {"order": (2, 0, 1)},
    "the output projection `proj` is missing": {"project": False},
}


def make(code: ModuleType, case: tuple) -> tuple[nn.Module, Tensor]:
    """An Attention with weights large enough that a softmax shows, and tokens (B, H, W, C)."""
    dim, heads, qkv_bias, H, W = case
    layer = find(code, "Attention")(dim, num_heads=heads, qkv_bias=qkv_bias).eval()
    for name, rows in (("qkv", 3 * dim), ("proj", dim)):
        linear = getattr(layer, name, None)
        problem = f"Attention({dim}) has no Linear called {name} with {rows} outputs"
        expect(isinstance(linear, nn.Linear) and linear.out_features == rows, problem)
    had, wanted = layer.qkv.bias is not None, "a" if qkv_bias else "no"
    expect(had == qkv_bias, f"Attention(qkv_bias={qkv_bias}): qkv must have {wanted} bias")
    random = torch.Generator().manual_seed(dim)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * dim**-0.5 * 1.5)
    return layer, torch.randn(2, H, W, dim, generator=random)


def attend(
    layer: nn.Module,
    x: Tensor,
    heads: int,
    *,
    power: float = -0.5,
    whole: bool = False,
    layout: str = "3hd",
    order: tuple[int, int, int] = (0, 1, 2),
    over: int | None = -1,
    transpose: bool = True,
    project: bool = True,
) -> Tensor:
    """softmax(q kᵀ head_dim^power) v per head, in double precision; the rest are mistakes."""
    B, H, W, C = x.shape
    sizes = {"3": 3, "h": heads, "d": C // heads}
    qkv, proj = ([t.double() for t in m.parameters()] for m in (layer.qkv, layer.proj))
    qkv = F.linear(x.double(), *qkv).view(B, H * W, *(sizes[axis] for axis in layout))
    at = {axis: 2 + layout.index(axis) for axis in layout}
    qkv = qkv.permute(at["3"], 0, at["h"], 1, at["d"])  # (3, B, heads, N, head_dim)
    q, k, v = (qkv[i] for i in order)
    scores = q @ k.transpose(-2, -1) * (C if whole else C // heads) ** power
    out = (scores if over is None else scores.softmax(over)) @ v
    out = (out.transpose(1, 2) if transpose else out).reshape(B, H, W, C)
    return F.linear(out, *proj) if project else out


def mistakes_of(layer: nn.Module, x: Tensor, heads: int) -> Mistakes:
    return {hint: lambda kw=kw: attend(layer, x, heads, **kw) for hint, kw in MISTAKES.items()}


@torch.no_grad()
def check_values(code: ModuleType) -> None:
    for case in CASES:
        layer, x = make(code, case)
        heads = case[1]
        what = f"Attention({case[0]}, num_heads={heads}) of {case[3]} x {case[4]} tokens"
        compare(what, layer(x), attend(layer, x, heads), mistakes_of(layer, x, heads))


@torch.no_grad()
def check_against_torch(code: ModuleType) -> None:
    """Scores of hundreds, whose exponential is no float32, beside torch's fused kernel."""
    dim, heads, _, H, W = case = (24, 4, True, 5, 6)
    layer, x = make(code, case)
    layer.qkv.weight *= 8
    qkv = layer.qkv(x).view(2, H * W, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    theirs = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(x.shape)
    found = layer(x)
    hint = "subtract the largest score before exp, as softmax does"
    expect(bool(found.isfinite().all()), "large scores give NaN or infinity", hint)
    what = "Attention of large scores, beside scaled_dot_product_attention"
    compare(what, found, layer.proj(theirs), mistakes_of(layer, x, heads), tol=1e-3)


def check_gradients(code: ModuleType) -> None:
    dim, heads, _, _, _ = case = CASES[0]
    layer, x = make(code, case)
    x.requires_grad_()
    wanted = {n: p for n, p in layer.named_parameters() if n.startswith(("qkv.", "proj."))}
    wanted["the tokens"] = x
    tensors = list(wanted.values())
    found = torch.autograd.grad(layer(x).square().sum(), tensors, allow_unused=True)
    right = torch.autograd.grad(attend(layer, x, heads).square().sum(), tensors)
    for name, mine, its in zip(wanted, found, right, strict=True):
        what = f"the gradient of {name} of Attention({dim})"
        expect(mine is not None, f"{what} is None", CUT)
        hints = {}
        if name == "qkv.weight":
            hints = {f"no gradient goes through {'qkv'[i]}: {CUT}": cut(its, i) for i in range(3)}
        compare(what, mine, its, hints, tol=1e-4)


def cut(gradient: Tensor, i: int) -> Callable[[], Tensor]:
    """The gradient (3 C, C) without that of q, k or v."""
    third = len(gradient) // 3
    return lambda: gradient.index_fill(0, torch.arange(i * third, (i + 1) * third), 0.0)
