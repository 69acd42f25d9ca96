"""Part I: the convolution, its three gradients, its module and a network made of it."""

from __future__ import annotations

import re
from itertools import product
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from checks.grading import DTYPE, CheckFailed, Mistakes, compare, expect, find

NAMES = ("input_feats", "weight", "bias")
TOL = 1e-8  # of float64
INVALID = re.compile(r"index (\d) - got \[([\d, ]*)\] but expected shape compatible with \[(.*)\]")


class Case(NamedTuple):
    """Small, for answers in Python loops; all sizes differ, so that a mix-up shows."""

    K: int = 3
    S: int = 1
    P: int = 1
    bias: bool = True
    N: int = 2
    C_i: int = 4
    C_o: int = 3
    H: int = 7
    W: int = 6

    def __str__(self) -> str:
        text = f"{self.K}x{self.K} kernel, stride {self.S}, padding {self.P}"
        return text if self.bias else f"{text}, no bias"

    def tensors(self, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor, Tensor | None]:
        random = torch.Generator().manual_seed(self.K)
        shapes = ((self.N, self.C_i, self.H, self.W), (self.C_o, self.C_i, self.K, self.K))
        x, w = (torch.randn(shape, generator=random, dtype=dtype) for shape in shapes)
        b = torch.randn(self.C_o, generator=random, dtype=dtype)
        return x, w, b if self.bias else None


CASES = [Case(K, S, P) for K, S, P in product((3, 1, 2, 5), (1, 2, 3), (1, 0, 2))]
CASES += [Case(bias=False), Case(2, 2, 0, bias=False), Case(N=1), Case(C_i=1, C_o=1)]
CASES += [Case(H=3, W=3, P=0), Case(P=4), Case(7, 2, 3, H=12)]


class Watch(TorchDispatchMode):
    """Refuses torch's own convolutions, which are what the answer has to replace."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in str(func):
            self.forbidden = str(func)
        return func(*args, **kwargs or {})

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        problem = f"torch's own convolution is called: {self.forbidden}"
        expect(not self.forbidden, problem, "fold, unfold and matrix products are allowed")


# ---- Forward ---------------------------------------------------------------------------------


def check_forward(code: ModuleType) -> None:
    for case in CASES:
        x, w, b = case.tensors()
        found = forward(code, case, x, w, b)
        right = F.conv2d(x, w, b, case.S, case.P)
        compare(
            f"the output ({case})", found, right, forward_mistakes(case, x, w, b, right), tol=TOL
        )


def forward(code: ModuleType, case: Case, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    with Watch():
        return find(code, "custom_conv2d")(x, w, b, case.S, case.P)


def forward_mistakes(case: Case, x: Tensor, w: Tensor, b: Tensor | None, right: Tensor) -> Mistakes:
    """What each would make of the output."""
    C_o, C_i, K, _ = w.shape
    S, P = case.S, case.P
    columns_last = w.flatten(1).view(C_o, K, K, C_i).permute(0, 3, 1, 2)
    weight_last = w.permute(0, 2, 3, 1).reshape(w.shape)
    return {
        "the bias is not added": lambda: F.conv2d(x, w, None, S, P),
        "the kernel is turned by 180°: in deep learning it is not": (
            lambda: F.conv2d(x, w.flip(2, 3), b, S, P)
        ),
        "rows and columns of the kernel are swapped": (
            lambda: F.conv2d(x, w.transpose(2, 3), b, S, P)
        ),
        "the columns are in the order (K, K, C_i), the weight is flattened as (C_i, K, K)": (
            lambda: F.conv2d(x, columns_last, b, S, P)
        ),
        "the weight is flattened as (K, K, C_i), the columns are in the order (C_i, K, K)": (
            lambda: F.conv2d(x, weight_last, b, S, P)
        ),
        "channels and positions are mixed: transpose (N, L, C_o) to (N, C_o, L) before reshaping": (
            lambda: right.permute(0, 2, 3, 1).reshape(right.shape)
        ),
        "height and width of the output are swapped": lambda: right.mT,
        "the output is read row by row, but its positions run down the columns": (
            lambda: right.mT.reshape(right.shape)
        ),
        "the output is read column by column, but its positions run along the rows": (
            lambda: right.reshape(right.mT.shape).mT
        ),
        "the padding is ignored": lambda: F.conv2d(x, w, b, S, 0),
        "the stride is ignored": lambda: F.conv2d(x, w, b, 1, P),
    }


def check_layouts(code: ModuleType) -> None:
    """In two more layouts and dtypes, forward and backward."""
    case = Case(3, 2, 1)
    layouts = {
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "columns in memory": lambda t: t.mT.contiguous().mT,
    }
    for dtype, (name, lay_out) in product((torch.double, torch.float), layouts.items()):
        x, w, b = case.tensors(dtype)
        tensors = [lay_out(x).requires_grad_(), lay_out(w).requires_grad_(), b.requires_grad_()]
        found, right = (
            f(*tensors, case.S, case.P) for f in (find(code, "custom_conv2d"), F.conv2d)
        )
        which, tol = (
            f"({name}, {dtype})".replace("torch.", ""),
            1e-5 if dtype == torch.float else TOL,
        )
        mistakes = forward_mistakes(case, x, w, b, right)
        compare(f"the output {which}", found, right, mistakes, tol=tol)
        expect(found.dtype == dtype, f"the output of {dtype} tensors is {found.dtype}", DTYPE)
        g = lay_out(torch.randn(right.shape, dtype=dtype))
        own, torchs = (torch.autograd.grad(y, tensors, g) for y in (found, right))
        for label, mine, its in zip(NAMES, own, torchs, strict=True):
            compare(f"the gradient of {label} {which}", mine, its, tol=tol)


# ---- Gradients -------------------------------------------------------------------------------


def check_input_gradient(code: ModuleType) -> None:
    check_gradient(code, 0)


def check_weight_gradient(code: ModuleType) -> None:
    check_gradient(code, 1)


def check_bias_gradient(code: ModuleType) -> None:
    check_gradient(code, 2)


def check_gradient(code: ModuleType, which: int) -> None:
    """Against torch's, which tells where; then against numeric ones of a right forward pass."""
    for case in CASES:
        tensors = case.tensors()
        if tensors[which] is None:
            continue
        for t in tensors:
            if t is not None:
                t.requires_grad_()
        right = F.conv2d(*tensors, case.S, case.P)
        g = torch.randn(right.shape, generator=torch.Generator().manual_seed(1), dtype=right.dtype)
        found = backward(code, case, tensors, g, which)
        (expected,) = torch.autograd.grad(right, tensors[which], g)
        mistakes = MISTAKES[which](case, tensors, g, expected)
        hint = "" if found is not None else "backward returns None in its place"
        what = f"the gradient of {NAMES[which]} ({case})"
        compare(what, found, expected, mistakes, hint=hint, tol=TOL)
    check_numerically(code, which)


def backward(
    code: ModuleType, case: Case, tensors: tuple[Tensor | None, ...], g: Tensor, which: int
) -> Tensor | None:
    found = forward(code, case, *tensors)
    hint = "see the check of the forward pass"
    expect(found.shape == g.shape, f"the output ({case}) has a wrong shape", hint)
    try:
        with Watch():
            return torch.autograd.grad(found, tensors[which], g, allow_unused=True)[0]
    except RuntimeError as e:
        if not (invalid := INVALID.search(str(e))):
            raise
        at = int(invalid[1])
        shapes = [tuple(map(int, re.findall(r"\d+", text))) for text in invalid.groups()[1:]]
    problem = f"the gradient of {NAMES[at]} ({case}) has shape {shapes[0]}, expected {shapes[1]}"
    padded = (case.N, case.C_i, case.H + 2 * case.P, case.W + 2 * case.P)
    hints = {
        (0, padded): "padding not removed: cut `padding` rows and columns from each side",
        (1, (case.C_i, case.C_o, case.K, case.K)): "channels in and out are swapped",
        (2, tuple(g.shape[1:])): "the sum over positions is missing",
    }
    raise CheckFailed(problem, hints.get((at, shapes[0]), ""))


def check_numerically(code: ModuleType, which: int) -> None:
    case = Case(3, 2, 1, N=2, C_i=2, C_o=2, H=5, W=4)
    tensors = list(case.tensors())
    if not torch.allclose(forward(code, case, *tensors), F.conv2d(*tensors, case.S, case.P)):
        return  # numeric gradients of a wrong forward pass tell nothing of this gradient

    def of_one(t: Tensor) -> Tensor:
        return code.custom_conv2d(*tensors[:which], t, *tensors[which + 1 :], case.S, case.P)

    agree = torch.autograd.gradcheck(
        of_one, tensors[which].requires_grad_(), raise_exception=False, check_undefined_grad=False
    )
    expect(agree, f"the gradient of {NAMES[which]} alone differs from the numeric one ({case})")


def input_mistakes(case: Case, tensors: tuple, g: Tensor, expected: Tensor) -> Mistakes:
    x, w, _ = (None if t is None else t.detach() for t in tensors)
    S, P, (H, W) = case.S, case.P, x.shape[2:]
    padded = (H + 2 * P, W + 2 * P)
    columns = w.flatten(1).t() @ g.flatten(2)  # (N, C_i K K, L)

    def turned() -> Tensor:
        flipped = w.flip(2, 3).flatten(1).t() @ g.flatten(2)
        return F.fold(flipped, (H, W), case.K, padding=P, stride=S)

    def overwritten() -> Tensor:
        dx = x.new_zeros(case.N, case.C_i, *padded)
        patches = columns.view(case.N, case.C_i, case.K, case.K, *g.shape[2:])
        for i, j in product(*map(range, g.shape[2:])):
            dx[..., i * S : i * S + case.K, j * S : j * S + case.K] = patches[..., i, j]
        return dx[..., P : P + H, P : P + W]

    def averaged() -> Tensor:
        times = F.fold(torch.ones_like(columns), (H, W), case.K, padding=P, stride=S)
        return expected / times.clamp(min=1)

    return {
        "padding not removed: cut `padding` rows and columns from each side, not 2 × from one": (
            lambda: F.fold(columns, padded, case.K, stride=S)[..., :H, :W]
        ),
        "the kernel is turned by 180° once too often, or once too seldom": turned,
        "where windows overlap the last one wins: add them up (col2im, F.fold)": overwritten,
        "where windows overlap they are averaged: add them up": averaged,
        "it is the mean over the batch's size": lambda: expected / case.N,
        "it is zero": lambda: torch.zeros_like(expected),
    }


def weight_mistakes(case: Case, tensors: tuple, g: Tensor, expected: Tensor) -> Mistakes:
    x, w, _ = tensors

    def of_images(chosen: slice) -> Tensor:
        output = F.conv2d(x[chosen], w, None, case.S, case.P)
        return torch.autograd.grad(output, w, g[chosen])[0]

    missing = "the sum over the batch is missing: this is the gradient of the {} image alone"
    return {
        missing.format("last"): lambda: of_images(slice(-1, None)),
        missing.format("first"): lambda: of_images(slice(0, 1)),
        "it is a mean over the batch: the gradient is the sum": lambda: expected / case.N,
        "it is a mean over positions: the gradient is the sum": (
            lambda: expected / g.shape[2:].numel()
        ),
        "the kernel's gradient is turned by 180°": lambda: expected.flip(2, 3),
        "rows and columns of the kernel are swapped": lambda: expected.transpose(2, 3),
        "columns are (C_i, K, K) in unfold: the gradient is reshaped in another order": (
            lambda: expected.permute(0, 2, 3, 1).reshape(expected.shape)
        ),
        "it is zero": lambda: torch.zeros_like(expected),
    }


def bias_mistakes(case: Case, tensors: tuple, g: Tensor, expected: Tensor) -> Mistakes:
    missing = "the sum over the batch is missing: this is the gradient of the {} image alone"
    return {
        missing.format("last"): lambda: g[-1].sum((1, 2)),
        missing.format("first"): lambda: g[0].sum((1, 2)),
        "it is a mean over the batch: the gradient is the sum": lambda: expected / case.N,
        "it is a mean over batch and positions: sum them": lambda: g.mean((0, 2, 3)),
        "it is a mean over positions: sum them": lambda: g.mean((2, 3)).sum(0),
        "it is summed over the channels too": lambda: g.sum().expand_as(expected),
        "it is zero": lambda: torch.zeros_like(expected),
    }


MISTAKES = (input_mistakes, weight_mistakes, bias_mistakes)


# ---- Module and network ----------------------------------------------------------------------


def check_module(code: ModuleType) -> None:
    """With the weights of an nn.Conv2d: the same output and the same step, so the same training."""
    for case in (Case(3, 2, 1), Case(5, 1, 2, bias=False)):
        arguments = {"kernel_size": case.K, "stride": case.S, "padding": case.P, "bias": case.bias}
        right = nn.Conv2d(case.C_i, case.C_o, **arguments)
        layer = find(code, "CustomConv2d")(case.C_i, case.C_o, **arguments)
        own, torchs = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (layer, right))
        expect(own == torchs, f"CustomConv2d ({case}) has parameters {own}, expected {torchs}")
        spread = layer.weight.std().item()
        expect(
            spread > 0, f"CustomConv2d.weight has standard deviation {spread:g}", "initialise it"
        )
        layer.load_state_dict(right.state_dict())
        x = case.tensors(torch.float)[0]
        mistakes = forward_mistakes(case, x, right.weight, right.bias, right(x))
        compare(f"the output of CustomConv2d ({case})", layer(x), right(x), mistakes)
        for module in (layer, right):
            module(x).square().sum().backward()
        for name in own:
            mine, its = getattr(layer, name).grad, getattr(right, name).grad
            compare(f"CustomConv2d.{name}.grad ({case})", mine, its)


def check_network(code: ModuleType) -> None:
    """default_cnn_model on CustomConv2d is what it is on nn.Conv2d: logits and gradients."""
    build, images = find(code, "default_cnn_model"), torch.rand(2, 3, 128, 128)
    nets = [build(conv_op=op, num_classes=7).eval() for op in (code.CustomConv2d, nn.Conv2d)]
    used = any(isinstance(module, code.CustomConv2d) for module in nets[0].modules())
    expect(used, "default_cnn_model(conv_op=CustomConv2d) holds no CustomConv2d")
    nets[0].load_state_dict(nets[1].state_dict())
    logits = [net(images) for net in nets]
    expect(logits[1].shape == (2, 7), f"the logits have shape {tuple(logits[1].shape)}, not (2, 7)")
    compare("the logits on CustomConv2d", *logits, tol=1e-4)
    for y in logits:
        F.cross_entropy(y, torch.tensor([0, 3])).backward()
    for (name, mine), its in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        compare(f"the gradient of {name} on CustomConv2d", mine.grad, its.grad, tol=1e-3)
