"""Part II: multi-head self-attention, against its definition in double precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks.grading import (
    CUT,
    Check,
    CheckFailed,
    Findings,
    Mistakes,
    attempt,
    compare,
    expect,
    find,
    own,
    value,
)

# (dim, num_heads, qkv_bias, H, W)
CASES = [(12, 3, True, 3, 4), (16, 2, False, 5, 2), (8, 1, True, 2, 3), (24, 4, True, 9, 8)]

SQRT_D = "the scale is forgotten: divide q kᵀ by the square root of head_dim"
ORDER = "wrong head order: the output of qkv is (3, num_heads, head_dim), here it is read as {}"
JOINED = "wrong head order: the output's heads are joined before (heads, N) is transposed"
BATCH = (
    "the heads are left in the batch axis: bring (B * heads, N, head_dim) back to "
    "(B, N, heads * head_dim) before proj"
)
PERMUTED = (
    "the output's heads are transposed: bring (B, heads, N, head_dim) to (B, N, heads, head_dim) "
    "before they are joined"
)
OVER_HEADS = "each token attends over its own heads: transpose N and heads before q kᵀ"

# What is done instead of attention, by the hint
MISTAKES = {
    SQRT_D: {"power": 0.0},
    "q kᵀ is divided by head_dim, not by its square root": {"power": -1.0},
    "q kᵀ is multiplied by the square root of head_dim: divide": {"power": 0.5},
    "the scale is the square root of dim: it is that of head_dim, dim / num_heads": {"whole": True},
    ORDER.format("(num_heads, 3, head_dim)"): {"layout": "h3d"},
    ORDER.format("(num_heads, head_dim, 3)"): {"layout": "hd3"},
    ORDER.format("(3, head_dim, num_heads)"): {"layout": "3dh"},
    "the softmax runs over the queries: it runs over the keys, dim=-1": {"over": -2},
    "the softmax runs over the heads: it runs over the keys, dim=-1": {"over": 1},
    "the softmax is missing": {"over": None},
    "q and k are swapped": {"order": (1, 0, 2)},
    "k and v are swapped": {"order": (0, 2, 1)},
    "q and v are swapped": {"order": (2, 1, 0)},
    "q, k, v are taken in the order k, v, q": {"order": (1, 2, 0)},
    "q, k, v are taken in the order v, q, k": {"order": (2, 0, 1)},
    JOINED: {"join": (0, 1, 2, 3)},
    OVER_HEADS: {"over_heads": True},
    BATCH: {"heads_first": True},
    "the output projection `proj` is missing": {"project": False},
}
JOINS = [p for p in permutations(range(4)) if p not in ((0, 2, 1, 3), (0, 1, 2, 3))]


class Sample(NamedTuple):
    """An Attention and its tokens; the weights are large enough that a softmax shows."""

    dim: int
    heads: int
    qkv_bias: bool
    x: Tensor  # (B, H, W, dim)
    weights: dict[str, Tensor]  # of qkv and proj

    def __str__(self) -> str:
        H, W = self.x.shape[1:3]
        return f"Attention({self.dim}, num_heads={self.heads}) of {H} x {W} tokens"


def sample(dim: int, heads: int, qkv_bias: bool, H: int, W: int, seed: int = 0) -> Sample:
    """Draw the weights and the tokens of a case."""
    random = torch.Generator().manual_seed(1000 * seed + dim)
    shapes = {"qkv.weight": (3 * dim, dim), "qkv.bias": (3 * dim,)}
    shapes |= {"proj.weight": (dim, dim), "proj.bias": (dim,)}
    weights = {
        name: torch.randn(shape, generator=random) * dim**-0.5 * 1.5
        for name, shape in shapes.items()
        if qkv_bias or name != "qkv.bias"
    }
    return Sample(dim, heads, qkv_bias, torch.randn(2, H, W, dim, generator=random), weights)


def attend(
    one: Sample,
    *,
    power: float = -0.5,
    whole: bool = False,
    layout: str = "3hd",
    order: tuple[int, int, int] = (0, 1, 2),
    over: int | None = -1,
    over_heads: bool = False,
    heads_first: bool = False,
    join: tuple[int, ...] = (0, 2, 1, 3),
    project: bool = True,
) -> Tensor:
    """softmax(q kᵀ head_dim^power) v per head, in double precision; the rest are mistakes.

    Vaswani et al., 2017, "Attention Is All You Need", equation 1 and section 3.2.2.
    """
    B, H, W, C = one.x.shape
    sizes = {"3": 3, "h": one.heads, "d": C // one.heads}
    weights = {name: tensor.double() for name, tensor in one.weights.items()}
    qkv = F.linear(one.x.double(), weights["qkv.weight"], weights.get("qkv.bias"))
    qkv = qkv.view(B, H * W, *(sizes[axis] for axis in layout))
    at = {axis: 2 + layout.index(axis) for axis in layout}
    qkv = qkv.permute(at["3"], 0, at["h"], 1, at["d"])  # (3, B, heads, N, head_dim)
    q, k, v = (qkv[i].transpose(1, 2) if over_heads else qkv[i] for i in order)
    scores = q @ k.transpose(-2, -1) * (C if whole else C // one.heads) ** power
    out = (scores if over is None else scores.softmax(over)) @ v
    out = out.transpose(1, 2) if over_heads else out
    if heads_first:
        out = out.reshape(one.heads, B, H * W, -1).transpose(0, 1)
    out = out.permute(join).reshape(B, H, W, C)
    return F.linear(out, weights["proj.weight"], weights["proj.bias"]) if project else out


def mistakes_of(one: Sample) -> Mistakes:
    """What each known mistake gives, then what two at once give."""
    kwargs = dict(_known_mistakes())
    return {hint: lambda kw=kw: attend(one, **kw) for hint, kw in kwargs.items()}


def _known_mistakes() -> Iterator[tuple[str, dict[str, Any]]]:
    yield from MISTAKES.items()
    yield from ((f"{PERMUTED} (here: {join})", {"join": join}) for join in JOINS)
    yield OVER_HEADS + " ", {"over_heads": True, "join": (0, 1, 2, 3)}
    for (first, a), (second, b) in combinations(MISTAKES.items(), 2):
        if not a.keys() & b.keys():
            yield f"{first}; and {second}", a | b


# ---- Probes ----------------------------------------------------------------------------------


def build(code: ModuleType, one: Sample) -> nn.Module:
    """The student's Attention with the weights of the sample.

    Raises:
        CheckFailed: it lacks qkv or proj, or their biases are others than asked for.
    """
    dim = one.dim
    layer = find(code, "Attention")(dim, num_heads=one.heads, qkv_bias=one.qkv_bias).eval()
    for name, rows in (("qkv", 3 * dim), ("proj", dim)):
        linear = getattr(layer, name, None)
        problem = f"Attention({dim}) has no Linear called {name} with {rows} outputs"
        expect(isinstance(linear, nn.Linear) and linear.out_features == rows, problem)
    had, wanted = layer.qkv.bias is not None, "a" if one.qkv_bias else "no"
    expect(had == one.qkv_bias, f"Attention(qkv_bias={one.qkv_bias}): qkv must have {wanted} bias")
    layer.load_state_dict(one.weights, strict=False)
    return layer


def values(seed: int) -> list[Sample]:
    """The cases of the check of the values."""
    return [sample(*case, seed) for case in CASES]


@torch.no_grad()
def probe_values(code: ModuleType, inputs: Sequence[Sample]) -> Findings:
    """The output of each case."""
    outputs = [attempt(lambda one=one: build(code, one)(one.x)) for one in inputs]
    return {"outputs": outputs}


def judge_values(inputs: Sequence[Sample], findings: Findings) -> None:
    """Against the definition."""
    for one, finding in zip(inputs, findings["outputs"], strict=True):
        try:
            found = value(finding, str(one))
        except CheckFailed as e:
            raise CheckFailed(str(e), e.hint or axis_hint(str(e), one)) from None
        hint = shape_hint(found, one)
        compare(str(one), found, attend(one), mistakes_of(one), hint=hint)


def axis_hint(error: str, one: Sample) -> str:
    """The heads of the output were not joined, if proj says so."""
    d = one.dim // one.heads
    return BATCH if f"x{d} and {one.dim}x" in error and one.heads > 1 else ""


def shape_hint(found: object, one: Sample) -> str:
    """Why the output has a wrong shape."""
    B, H, W, C = one.x.shape
    shape, d = tuple(found.shape) if isinstance(found, Tensor) else (), C // one.heads
    if shape == (B, H * W, C):
        return "give the tokens their place on the grid back: (B, H, W, C)"
    if shape and shape[-1] == d and one.heads > 1:
        return BATCH
    if isinstance(found, Tensor) and found.shape == one.x.shape and torch.equal(found, one.x):
        return "the tokens are returned unchanged"
    return ""


def large_scores(seed: int) -> Sample:
    """Scores of hundreds, whose exponential is no float32."""
    one = sample(24, 4, True, 5, 6, seed)
    return one._replace(weights=one.weights | {"qkv.weight": one.weights["qkv.weight"] * 8})


@torch.no_grad()
def probe_large_scores(code: ModuleType, one: Sample) -> Findings:
    """The output."""
    return {"output": build(code, one)(one.x)}


def judge_large_scores(one: Sample, findings: Findings) -> None:
    """Against torch's fused kernel."""
    B, H, W, C = one.x.shape
    qkv = F.linear(one.x, one.weights["qkv.weight"], one.weights["qkv.bias"])
    qkv = qkv.view(B, H * W, 3, one.heads, C // one.heads).permute(2, 0, 3, 1, 4)
    right = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(one.x.shape)
    right = F.linear(right, one.weights["proj.weight"], one.weights["proj.bias"])
    found = findings["output"]
    if isinstance(found, Tensor) and not found.isfinite().all():
        hint = "subtract the largest score before exp, as softmax does"
        raise CheckFailed("large scores give NaN or infinity", hint)
    what = "Attention of large scores, against scaled_dot_product_attention"
    compare(what, found, right, mistakes_of(one), hint=shape_hint(found, one), tol=1e-3)


def gradient_sample(seed: int) -> Sample:
    """The first case."""
    return sample(*CASES[0], seed)


def probe_gradients(code: ModuleType, one: Sample) -> Findings:
    """The gradients of the weights and the tokens for the sum of squares."""
    layer, x = build(code, one), one.x.clone().requires_grad_()
    wanted = {n: p for n, p in layer.named_parameters() if n in one.weights} | {"the tokens": x}
    loss = layer(x).square().sum()
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = dict(zip(wanted, grads, strict=True))
    return {"grads": found}


def judge_gradients(one: Sample, findings: Findings) -> None:
    """Against those of the definition."""
    weights = {n: t.clone().requires_grad_() for n, t in one.weights.items()}
    leaves = weights | {"the tokens": one.x.clone().requires_grad_()}
    loss = attend(one._replace(x=leaves["the tokens"], weights=weights)).square().sum()
    right = torch.autograd.grad(loss, list(leaves.values()))
    for name, its in zip(leaves, right, strict=True):
        what, found = f"the gradient of {name} of {one}", findings["grads"].get(name)
        expect(found is not None, f"{what} is None", CUT)
        hints = {}
        if name == "qkv.weight":
            hints = {
                f"no gradient goes through {letter}: {CUT}": lambda its=its, i=i: cut(its, i)
                for i, letter in enumerate("qkv")
            }
        compare(what, found, its, hints, tol=1e-4)


def cut(gradient: Tensor, i: int) -> Tensor:
    """The gradient (3 C, C) without that of q, k or v."""
    third = len(gradient) // 3
    return gradient.index_fill(0, torch.arange(i * third, (i + 1) * third), 0.0)


HANDOUT = "handout, part II: implement the self-attention of the transformer block"

CHECKS = (
    Check(
        "attention",
        1.0,
        "softmax attention, head by head",
        *own("Attention", probe_values, judge_values),
        "Attention with given weights, 1 to 4 heads, with and without a qkv bias, on four grids of "
        f"tokens, against softmax(q kᵀ / sqrt(head_dim)) v in float64 ({HANDOUT})",
        values,
    ),
    Check(
        "attention",
        0.5,
        "large scores, against PyTorch's own",
        *own("Attention", probe_large_scores, judge_large_scores),
        "scores of hundreds, whose exponential overflows float32, against "
        f"scaled_dot_product_attention ({HANDOUT})",
        large_scores,
    ),
    Check(
        "attention",
        0.5,
        "gradients",
        *own("Attention", probe_gradients, judge_gradients),
        f"gradients of qkv, proj and the tokens against those of the definition ({HANDOUT})",
        gradient_sample,
    ),
)
