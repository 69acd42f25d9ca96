"""Part II: windows, and the transformer block that attends within them.

What Attention computes is checked elsewhere: here its outputs are taken as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks.grading import (
    Check,
    CheckFailed,
    Findings,
    Mistakes,
    NotGraded,
    attempt,
    compare,
    expect,
    find,
    own,
    value,
)

DIM, HEADS, HIDDEN = 12, 3, 48
WINDOW = 3
COPIES, BATCHES = 64, 16  # of the tokens, with draws of stochastic depth
TOL = 5e-3  # also of GELU's tanh approximation
PADDING = "the padding is not removed: give window_unpartition the height and width before padding"
NO_ATTENTION = "no token sees another one: does Attention do anything yet?"

# ---- Windows ---------------------------------------------------------------------------------


class Grid(NamedTuple):
    """Tokens x (B, H, W, C), their right windows, and the padded tokens."""

    ws: int
    x: Tensor
    windows: Tensor  # (B * number of windows, ws, ws, C)
    padded: Tensor  # (B, H', W', C)


def grid(H: int, W: int, ws: int) -> Grid:
    """Number the tokens' channels, pad at the bottom and the right, and cut into windows."""
    x = torch.arange(1.0, 2 * H * W * 3 + 1).view(2, H, W, 3)
    rows, columns = -(-H // ws), -(-W // ws)
    padded = x.new_zeros(2, rows * ws, columns * ws, 3)
    padded[:, :H, :W] = x
    cut = padded.view(2, rows, ws, columns, ws, 3)
    return Grid(ws, x, cut.transpose(2, 3).reshape(-1, ws, ws, 3), padded)


def grids(seed: int) -> list[Grid]:
    """With padding and without."""
    return [grid(*sizes) for sizes in ((4, 6, 2), (5, 7, 3), (3, 2, 4), (8, 8, 4))]


def window_functions(code: ModuleType) -> tuple[Callable, Callable]:
    """The student's, or those of custom_blocks.py."""
    names = ("window_partition", "window_unpartition")
    if all(hasattr(code, name) for name in names):
        return tuple(getattr(code, name) for name in names)
    blocks = importlib.import_module("custom_blocks")
    return tuple(getattr(code, name, None) or find(blocks, name) for name in names)


def probe_windows(code: ModuleType, inputs: Sequence[Grid]) -> Findings:
    """Both functions, each from right arguments; and whether the block attends at all."""
    try:
        partition, unpartition = window_functions(code)
    except ImportError:
        return {"missing": True}
    cuts, backs = [], []
    for one in inputs:
        pad_hw, hw = tuple(one.padded.shape[1:3]), tuple(one.x.shape[1:3])
        cuts.append(attempt(partition, one.x, one.ws))
        backs.append(attempt(unpartition, one.windows, one.ws, pad_hw, hw))
    block = find(code, "TransformerBlock")(DIM, HEADS).eval()
    x = torch.randn(1, 4, 5, DIM)
    return {"cuts": cuts, "backs": backs, "seen": receptive_field(block, x)}


def judge_windows(inputs: Sequence[Grid], findings: Findings) -> None:
    """Cut and put together again."""
    if "missing" in findings:
        raise NotGraded("there is no custom_blocks.py")
    for one, cut, back in zip(inputs, findings["cuts"], findings["backs"], strict=True):
        judge_cut(one, cut)
        judge_back(one, back)
    expect(int(findings["seen"].sum()) > 1, NO_ATTENTION)


def judge_cut(one: Grid, cut: object) -> None:
    """window_partition: the windows, and the padded height and width."""
    H, W = one.x.shape[1:3]
    what = f"window_partition of {H} x {W} tokens, windows of {one.ws}"
    windows, pad_hw = value(cut, what)
    mistakes = {
        "rows of tokens are reshaped into windows: transpose rows and windows first": (
            lambda: one.padded.reshape(-1, one.ws, one.ws, 3)
        ),
        "height and width are swapped": lambda: one.windows.transpose(1, 2),
    }
    compare(what, windows, one.windows, mistakes)
    size = one.padded.shape[1:3]
    problem = f"{what} returns {pad_hw} as the padded height and width, not {tuple(size)}"
    expect(list(pad_hw) == list(size), problem)


def judge_back(one: Grid, back: object) -> None:
    """window_unpartition: the tokens without their padding."""
    H, W = one.x.shape[1:3]
    mistakes = {
        "padding not removed: keep the first H rows and W columns": lambda: one.padded,
        "padding is cut off the wrong side": lambda: one.padded[:, -H:, -W:],
        "windows are reshaped into rows of tokens: transpose rows and windows first": (
            lambda: one.windows.reshape(one.padded.shape)[:, :H, :W]
        ),
    }
    what = f"window_unpartition to {H} x {W} tokens, windows of {one.ws}"
    compare(what, value(back, what), one.x, mistakes)


# ---- The block -------------------------------------------------------------------------------


class Sample(NamedTuple):
    """Tokens x (B, H, W, DIM) and weights large enough that the branches show."""

    x: Tensor
    norms: tuple[tuple[Tensor, Tensor], ...]  # of both LayerNorms
    linears: tuple[tuple[Tensor, Tensor], ...]  # of the MLP
    attention: dict[str, Tensor]


def sample(seed: int) -> Sample:
    """Draw the weights and 4 x 5 tokens."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random) * 0.4

    shapes = {"qkv.weight": (3 * DIM, DIM), "qkv.bias": (3 * DIM,)}
    shapes |= {"proj.weight": (DIM, DIM), "proj.bias": (DIM,)}
    return Sample(
        2.5 * draw(2, 4, 5, DIM),
        ((1 + draw(DIM), draw(DIM)), (1 + draw(DIM), draw(DIM))),
        ((draw(HIDDEN, DIM), draw(HIDDEN)), (draw(DIM, HIDDEN), draw(DIM))),
        {name: draw(*shape) for name, shape in shapes.items()},
    )


@torch.no_grad()
def build(code: ModuleType, one: Sample, **kwargs) -> tuple[nn.Module, nn.Module | None]:
    """A block in evaluation mode with the weights of the sample, and its Attention.

    None instead of it if the block has other parts than two LayerNorms, an Attention and two
    Linears; their weights are then random numbers.
    """
    block = find(code, "TransformerBlock")(DIM, HEADS, **kwargs).eval()
    attention = next((m for m in block.modules() if hasattr(m, "qkv") and hasattr(m, "proj")), None)
    inside = set() if attention is None else set(attention.modules())
    norms = [m for m in block.modules() if isinstance(m, nn.LayerNorm)]
    linears = [m for m in block.modules() if isinstance(m, nn.Linear) and m not in inside]
    shapes = [
        () if m.weight is None or m.bias is None else tuple(m.weight.shape)
        for m in (*norms, *linears)
    ]
    if attention is None or shapes != [(DIM,), (DIM,), (HIDDEN, DIM), (DIM, HIDDEN)]:
        random = torch.Generator().manual_seed(5)
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.4)
        return block, None
    for module, (weight, bias) in zip((*norms, *linears), (*one.norms, *one.linears), strict=True):
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    attention.load_state_dict(one.attention, strict=False)
    return block, attention


def probe_block(code: ModuleType, one: Sample) -> Findings:
    """Outputs with what Attention got and gave, with zero weights, and in training mode."""
    block, attention = build(code, one, drop_path=0.5)
    calls: list[tuple[Tensor, Tensor]] = []
    if attention is not None:
        attention.register_forward_hook(lambda _, inputs, out: calls.append((inputs[0], out)))
    with torch.no_grad():
        y = block(one.x)
        found = {"y": y, "calls": list(calls), "again": block(one.x)}
        block.train()
        found["trained"] = attempt(repeated, block, one.x[:1])
    found["seen"] = receptive_field(block.eval(), one.x)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        return found | {"zero": block(one.x)}


def judge_block(one: Sample, findings: Findings) -> None:
    """Pre-norm, two residual branches with stochastic depth; every token sees every other."""
    y, seen = findings["y"], findings["seen"]
    compare("a second run of a block in eval mode", findings["again"], y, tol=1e-6)
    if len(findings["calls"]) == 1:
        judge_branches(one, y, *findings["calls"][0])
    expect(int(seen.sum()) > 1, NO_ATTENTION, "a block without windows attends to all tokens")
    hint = "a block without windows attends to all tokens"
    expect(bool((seen > 0).all()), f"token (0, 0) does not see {first(seen == 0)} of 4 x 5", hint)
    what = "a block whose parameters are all zero (its branches add nothing), of tokens x"
    mistakes = {
        "a residual connection is missing: x + branch(norm(x)), twice": (
            lambda: torch.zeros_like(one.x)
        ),
        "the tokens are added twice": lambda: 2 * one.x,
    }
    compare(what, findings["zero"], one.x, mistakes)
    judge_drop_path(value(findings["trained"], "in training mode a block"))


def judge_branches(one: Sample, y: object, given: object, out: object) -> None:
    """The output, from what Attention gave: x + attention, then + MLP, each of a LayerNorm."""
    hints = {
        "norm1 is not used: attention gets the tokens themselves": lambda: one.x,
        "norm2 is used in place of norm1": lambda: norm(one.x, one, 2),
    }
    compare("what a block gives to Attention", given, norm(one.x, one, 1), hints, tol=TOL)
    expect(isinstance(out, Tensor) and out.shape == one.x.shape, "Attention changes the shape")
    compare("the output of a block", y, branches(one, out), branch_mistakes(one, out), tol=TOL)


def norm(x: Tensor, one: Sample, which: int) -> Tensor:
    """LayerNorm over the channels: norm1 or norm2."""
    return F.layer_norm(x, (DIM,), *one.norms[which - 1])


def mlp(x: Tensor, one: Sample) -> Tensor:
    """Two linear layers with a GELU between them."""
    fc1, fc2 = one.linears
    return F.linear(F.gelu(F.linear(x, *fc1)), *fc2)


def branches(one: Sample, out: Tensor, **wrong: Any) -> Tensor:
    """x1 = x + out, then x1 + MLP(norm(x1)); `wrong` replaces a term."""
    x1 = wrong.get("shortcut", one.x) + out
    if "post_norm" in wrong:
        return norm(x1 + mlp(x1, one), one, 2)
    branch = mlp(x1 if "no_norm" in wrong else norm(x1, one, wrong.get("norm", 2)), one)
    return wrong.get("shortcut2", x1) + branch


def branch_mistakes(one: Sample, out: Tensor) -> Mistakes:
    """What each would make of a block's output."""
    x, zero = one.x, torch.zeros_like(one.x)
    lost = "attention is lost: the second residual starts from the block's input, not from the sum"
    missing = "a residual connection is missing: x + branch(norm(x)), twice"
    return {
        lost: lambda: branches(one, out, shortcut2=x),
        missing: lambda: branches(one, out, shortcut=zero),
        missing + " ": lambda: branches(one, out, shortcut2=zero),
        missing + "  ": lambda: branches(one, out, shortcut=zero, shortcut2=zero),
        "a shortcut starts behind norm1: it starts before": (
            lambda: branches(one, out, shortcut=norm(x, one, 1))
        ),
        "a shortcut starts behind norm2: it starts before": (
            lambda: branches(one, out, shortcut2=norm(x + out, one, 2))
        ),
        "the tokens are added twice": lambda: branches(one, out, shortcut2=2 * x + out),
        "the tokens are added twice ": lambda: branches(one, out, shortcut2=2 * (x + out)),
        "norm1 is used in place of norm2": lambda: branches(one, out, norm=1),
        "norm2 is not used": lambda: branches(one, out, no_norm=True),
        "the norms come after the branches: they come before (pre-norm)": (
            lambda: branches(one, out, post_norm=True)
        ),
        "the MLP is not used": lambda: x + out,
        "attention is computed, but its output is not used": lambda: branches(one, zero),
        "attention's output is not used: the branch adds norm1's": (
            lambda: branches(one, norm(x, one, 1))
        ),
    }


def repeated(net: nn.Module, x: Tensor) -> Tensor:
    """Outputs for copies of x, in batches: stochastic depth may draw once for a whole batch."""
    copies = x.expand(COPIES // BATCHES, *[-1] * (x.dim() - 1)).contiguous()
    return torch.cat([net(copies) for _ in range(BATCHES)])


def judge_drop_path(trained: Tensor) -> None:
    """With drop_path=0.5, either branch of each of the equal images is dropped or kept: 4 kinds."""
    kinds = len(torch.unique((trained.flatten(1) * 1e4).round(), dim=0))
    hint = "x + self.drop_path(branch(norm(x))), for both branches"
    problem = "drop_path=0.5 drops nothing in training mode"
    expect(kinds > 1, problem, hint)
    expect(kinds > 2, "drop_path=0.5 drops one of the two residual branches alone", hint)


@torch.enable_grad()
def receptive_field(block: nn.Module, x: Tensor, i: int = 0, j: int = 0) -> Tensor:
    """1 for each token (H, W) that the output at (i, j) of the first image depends on, else 0."""
    x = x.clone().requires_grad_()
    weights = torch.linspace(-1, 1.5, DIM)  # not all equal: a LayerNorm's outputs sum to zero
    (gradient,) = torch.autograd.grad((block(x)[0, i, j] * weights).sum(), x)
    return (gradient[0].abs().sum(-1) > 0).long()


def first(mask: Tensor) -> str:
    """The first token of a mask (H, W)."""
    places = mask.nonzero()
    return f"token {tuple(places[0].tolist())}" if len(places) else "any token"


# ---- Attention within windows ----------------------------------------------------------------

SIZES = ((6, 9), (7, 5))  # without and with padding


class Windows(NamedTuple):
    """A sample with two grids of tokens, and a part of one window."""

    one: Sample
    grids: tuple[Tensor, ...]
    small: Tensor


def windowed_sample(seed: int) -> Windows:
    """Draw the tokens (2, H, W, DIM)."""
    random = torch.Generator().manual_seed(seed + 1)
    drawn = [torch.randn(2, *size, DIM, generator=random) for size in (*SIZES, (2, 2))]
    return Windows(sample(seed), tuple(drawn[:-1]), drawn[-1])


def corners(x: Tensor) -> list[tuple[slice, slice, slice]]:
    """The places of the windows without padding, as an index."""
    H, W = x.shape[1:3]
    return [
        (slice(None), slice(i, i + WINDOW), slice(j, j + WINDOW))
        for i in range(0, H - WINDOW + 1, WINDOW)
        for j in range(0, W - WINDOW + 1, WINDOW)
    ]


def probe_windowed(code: ModuleType, inputs: Windows) -> Findings:
    """A block with windows, and one without that sees a window alone."""
    windowed, alone = (build(code, inputs.one, window_size=w)[0] for w in (WINDOW, 0))
    try:
        alone.load_state_dict(windowed.state_dict())
    except RuntimeError:
        raise CheckFailed(
            "the parameters of a TransformerBlock depend on its window_size"
        ) from None
    found = []
    with torch.no_grad():
        for x in inputs.grids:
            windows = [alone(x[place]) for place in corners(x)]
            y = attempt(windowed, x)
            found.append({"y": y, "windows": windows, "global": alone(x)})
        small = {"windowed": attempt(windowed, inputs.small), "alone": alone(inputs.small)}
    seen = [[receptive_field(windowed, inputs.grids[0], i, j) for j in range(3)] for i in range(3)]
    return {"grids": found, "small": small, "seen": seen}


def judge_windowed(inputs: Windows, findings: Findings) -> list[str]:
    """Each window gives what a block without windows, with the same weights, gives for it."""
    for x, found in zip(inputs.grids, findings["grids"], strict=True):
        y = windowed_output(x, found["y"])
        for place, right in zip(corners(x), found["windows"], strict=True):
            H, W, i, j = *x.shape[1:3], place[1].start, place[2].start
            what = f"the window from ({i}, {j}) of {H} x {W} tokens, window_size {WINDOW}"
            mistakes = {
                "window_size is ignored: attention is global": lambda y=found["global"], p=place: y[
                    p
                ]
            }
            hint = "" if torch.allclose(y[place], right, atol=1e-4) else order_hint(findings)
            compare(what, y[place], right, mistakes, hint=hint, tol=1e-4)
    expect(int(findings["seen"][0][0].sum()) > 1, NO_ATTENTION)
    small = findings["small"]
    if torch.allclose(windowed_output(inputs.small, small["windowed"]), small["alone"], atol=1e-4):
        return []
    return [
        "tokens that pad a window act as keys there, which takes attention from the real ones; "
        "mask them (the skeleton does not ask for it)"
    ]


def windowed_output(x: Tensor, finding: object) -> Tensor:
    """The block's output; a failure is attributed to the padding where there is one."""
    hint = PADDING if x.shape[1] % WINDOW else ""
    sizes = f"{x.shape[1]} x {x.shape[2]} tokens" + (" that need padding" if hint else "")
    try:
        y = value(finding, f"a block with windows fails on {sizes}:")
    except CheckFailed as e:
        raise CheckFailed(str(e), hint or e.hint) from None
    shape = tuple(y.shape) if isinstance(y, Tensor) else y
    expect(shape == tuple(x.shape), f"a block maps {tuple(x.shape)} to {shape}", hint)
    return y


def order_hint(findings: Findings) -> str:
    """Why a window came out wrong."""
    for i, row in enumerate(findings["seen"]):
        for j, seen in enumerate(row):
            beyond = seen.clone()
            beyond[:WINDOW, :WINDOW] = 0
            if beyond.any():
                return (
                    f"token {i, j} sees {first(beyond)} of another window: are they put in order?"
                )
    return "tokens are mixed up within their window"


HANDOUT = "handout, part II: the transformer block, global or within windows"

CHECKS = (
    Check(
        "blocks",
        0.125,
        "windows cut and put together",
        *own("TransformerBlock", probe_windows, judge_windows),
        "window_partition and window_unpartition, the student's or those of custom_blocks, on "
        f"grids with and without padding; Attention has to attend ({HANDOUT})",
        grids,
    ),
    Check(
        "blocks",
        0.25,
        "residual branches, global attention",
        *own("TransformerBlock", probe_block, judge_block),
        "x + attention(norm1(x)), then + MLP(norm2(·)), from what Attention gave; zero weights "
        f"give x; drop_path is used in training; every token sees every other ({HANDOUT})",
        sample,
    ),
    Check(
        "blocks",
        0.375,
        "attention within windows",
        *own("TransformerBlock", probe_windowed, judge_windowed),
        "each window of a block with window_size gives what it gives alone to a block without, of "
        f"the same weights; with and without padding ({HANDOUT})",
        windowed_sample,
    ),
)
