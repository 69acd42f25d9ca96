"""Part II: windows, and the transformer block that attends within them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import product
from types import ModuleType

import torch
from torch import Tensor, nn

from checks.grading import CheckFailed, compare, expect, find

DIM, HEADS = 12, 3
PADDING = "the padding is not removed: give window_unpartition the height and width before padding"


def window_functions(code: ModuleType) -> tuple[Callable, Callable]:
    """The student's, or those of the custom_blocks.py beside."""
    blocks = importlib.import_module("custom_blocks")
    names = ("window_partition", "window_unpartition")
    return tuple(getattr(code, name, None) or find(blocks, name) for name in names)


def check_windows(code: ModuleType) -> None:
    """Cut and put together again, with padding at the bottom and the right and without."""
    partition, unpartition = window_functions(code)
    for H, W, ws in ((4, 6, 2), (5, 7, 3), (3, 2, 4), (8, 8, 4)):
        x = torch.arange(1.0, 2 * H * W * 3 + 1).view(2, H, W, 3)
        rows, columns = -(-H // ws), -(-W // ws)
        padded = x.new_zeros(2, rows * ws, columns * ws, 3)
        padded[:, :H, :W] = x
        cut = padded.view(2, rows, ws, columns, ws, 3)
        right = cut.transpose(2, 3).reshape(-1, ws, ws, 3)
        what = f"window_partition of {H} x {W} tokens, windows of {ws}"
        windows, pad_hw = partition(x, ws)
        unmoved = "rows of tokens are reshaped into windows: transpose rows and windows first"
        mistakes = {
            unmoved: lambda padded=padded, ws=ws: padded.reshape(-1, ws, ws, 3),
            "height and width are swapped": lambda right=right: right.transpose(1, 2),
        }
        compare(what, windows, right, mistakes)
        size = (rows * ws, columns * ws)
        expect(tuple(pad_hw) == size, f"{what} says that they are padded to {pad_hw}, not {size}")
        back = unpartition(windows, ws, pad_hw, (H, W))
        mistakes = {
            "padding not removed: keep the first H rows and W columns": lambda p=padded: p,
            "padding is cut off the wrong side": lambda p=padded, H=H, W=W: p[:, -H:, -W:],
            "windows are reshaped into rows of tokens: transpose rows and windows first": (
                lambda cut=right, p=padded, H=H, W=W: cut.reshape(p.shape)[:, :H, :W]
            ),
        }
        compare(f"window_unpartition to {H} x {W} tokens, windows of {ws}", back, x, mistakes)


def make(code: ModuleType, **kwargs) -> nn.Module:
    """A block in evaluation mode, with weights large enough that its branches show."""
    block = find(code, "TransformerBlock")(DIM, HEADS, **kwargs).eval()
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.4)
    return block


def tokens(H: int, W: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, H, W, DIM, generator=torch.Generator().manual_seed(H * 100 + W))


@torch.no_grad()
def check_block(code: ModuleType) -> None:
    """Pre-norm: all branches at zero leave the tokens as they are; every token sees every other."""
    x = tokens(4, 5)
    block = make(code, drop_path=0.3)
    expect(torch.equal(block(x), block(x)), "a block in eval mode gives different outputs")
    seen = reach(block, x)
    hint = "a block without windows attends to all tokens"
    expect(bool(seen.all()), f"token (0, 0) does not see {first(~seen)} of 4 x 5", hint)
    for parameter in block.parameters():
        parameter.zero_()
    what = "a block whose parameters are all zero (its branches add nothing), of tokens x"
    mistakes = {
        "a residual connection is missing: x + branch(norm(x)), twice": lambda: torch.zeros_like(x),
        "the tokens are added twice": lambda: 2 * x,
    }
    compare(what, block(x), x, mistakes)


@torch.no_grad()
def check_windowed_block(code: ModuleType) -> list[str]:
    """A window is worth what it is worth alone: to a block without windows, the same weights."""
    ws = 3
    windowed, alone = make(code, window_size=ws), make(code)
    try:
        alone.load_state_dict(windowed.state_dict())
    except RuntimeError:
        raise CheckFailed(
            "the parameters of a TransformerBlock depend on its window_size"
        ) from None
    for H, W in ((6, 9), (7, 5)):
        x = tokens(H, W)
        found = run_windowed(windowed, x, padded=H % ws > 0)
        for i in range(0, H - ws + 1, ws):
            for j in range(0, W - ws + 1, ws):
                place = (slice(None), slice(i, i + ws), slice(j, j + ws))
                what = f"the window from ({i}, {j}) of {H} x {W} tokens, window_size {ws}"
                mistakes = {
                    "window_size is ignored: attention is global": (
                        lambda x=x, place=place: alone(x)[place]
                    )
                }
                try:
                    compare(what, found[place], alone(x[place]), mistakes)
                except CheckFailed as e:
                    raise CheckFailed(str(e), e.hint or order_hint(windowed, x, ws)) from None
    x = tokens(2, 2)  # a part of one window
    if torch.allclose(windowed(x), alone(x), atol=1e-5):
        return []
    return [
        "tokens that pad a window act as keys there, which takes attention from the real ones; "
        "mask them (the skeleton does not ask for it)"
    ]


def run_windowed(block: nn.Module, x: Tensor, padded: bool) -> Tensor:
    try:
        found = block(x)
    except RuntimeError:
        if padded:  # without padding it did not raise
            sizes = f"{x.shape[1]} x {x.shape[2]} tokens that need padding"
            raise CheckFailed(f"a block with windows fails on {sizes}", PADDING) from None
        raise
    problem = f"a block maps {tuple(x.shape)} to {tuple(found.shape)}"
    expect(found.shape == x.shape, problem, PADDING if padded else "")
    return found


def order_hint(block: nn.Module, x: Tensor, ws: int) -> str:
    """Why a window came out wrong."""
    for i, j in product(range(ws), repeat=2):
        beyond = reach(block, x, i, j)
        beyond[:ws, :ws] = False
        if beyond.any():
            return f"token {i, j} sees {first(beyond)} of another window: are they put in order?"
    return "tokens are mixed up within their window"


@torch.enable_grad()
def reach(block: nn.Module, x: Tensor, i: int = 0, j: int = 0) -> Tensor:
    """Which tokens (H, W) the output at (i, j) of the first image depends upon."""
    x = x.clone().requires_grad_()
    weights = torch.linspace(-1, 1.5, DIM)  # not all alike: a LayerNorm's outputs sum to nothing
    (gradient,) = torch.autograd.grad((block(x)[0, i, j] * weights).sum(), x)
    return gradient[0].abs().sum(-1) > 0


def first(mask: Tensor) -> str:
    places = mask.nonzero()
    return f"token {tuple(places[0].tolist())}" if len(places) else "any token"
