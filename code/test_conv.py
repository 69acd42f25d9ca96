"""Check the convolution in student_code.py:

    python test_conv.py

Forward against torch's own convolution, gradients against numeric ones and torch's, then the
module CustomConv2d, with a bias and without, and an in-place ReLU behind it, as in SimpleNet. All
in double precision on the CPU, in seconds, with nothing but torch. The first problem is printed and
ends the check with exit status 1.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C ends it at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from student_code import CustomConv2d, custom_conv2d

# The stated shape: a batch, its channels in and out, height and width (unequal, so that a mix-up
# shows), and the convolution's kernel size, stride and padding.
STATED = {"N": 4, "C_i": 3, "C_o": 8, "H": 32, "W": 30, "K": 3, "S": 2, "P": 1}

# Small enough for numeric gradients of every number: (K, S, P)
SMALL = {"N": 2, "C_i": 3, "C_o": 2, "H": 6, "W": 5}
VARIANTS = [(3, 1, 1), (3, 1, 0), (3, 2, 1), (1, 1, 0), (1, 2, 0), (2, 2, 0), (5, 2, 2)]


def inputs(N: int, C_i: int, C_o: int, H: int, W: int, K: int, **_: int) -> tuple[Tensor, ...]:
    """Random x (N, C_i, H, W), w (C_o, C_i, K, K) and b (C_o,), each requiring a gradient."""
    shapes = ((N, C_i, H, W), (C_o, C_i, K, K), (C_o,))
    return tuple(torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes)


def expect(condition: bool, problem: str) -> None:
    """Print the problem and end with exit status 1, unless `condition` holds."""
    if not condition:
        print(f"FAILED: {problem}")
        sys.exit(1)


def compare(what: str, yours: Tensor | None, right: Tensor) -> None:
    """End the check unless both are the same; print the first number that differs."""
    expect(yours is not None, f"{what} is None")
    shapes = f"{what} has shape {tuple(yours.shape)}, expected {tuple(right.shape)}"
    expect(yours.shape == right.shape, shapes)
    expect(yours.dtype == right.dtype, f"{what} is {yours.dtype}, expected {right.dtype}")
    wrong = (~torch.isclose(yours, right, rtol=1e-8, atol=1e-8)).nonzero()  # NaN is wrong too
    if len(wrong):
        first = tuple(wrong[0].tolist())
        numbers = f"yours {yours[first].item():.8g}, right {right[first].item():.8g}"
        expect(False, f"{what} is wrong at {len(wrong)} places, first at {first}: {numbers}")


def check_forward(shape: dict[str, int]) -> None:
    """Against torch's convolution."""
    x, w, b = inputs(**shape)
    S, P = shape["S"], shape["P"]
    compare("the output", custom_conv2d(x, w, b, S, P), F.conv2d(x, w, b, S, P))


def check_gradients(shape: dict[str, int], fast: bool) -> None:
    """Against torch's, which shows where; then against numeric ones, which need no reference."""
    tensors, S, P = inputs(**shape), shape["S"], shape["P"]
    right = F.conv2d(*tensors, S, P)
    G = torch.randn_like(right)
    names = ("input_feats", "weight", "bias")
    yours = torch.autograd.grad(custom_conv2d(*tensors, S, P), tensors, G, allow_unused=True)
    torchs = torch.autograd.grad(right, tensors, G)
    for name, mine, its in zip(names, yours, torchs, strict=True):
        compare(f"the gradient of {name}", mine, its)
    agree = gradcheck(custom_conv2d, (*tensors, S, P), fast_mode=fast, raise_exception=False)
    expect(agree, "the gradients differ from numeric ones")


def check_without_bias(shape: dict[str, int]) -> None:
    """bias=None, as CustomConv2d(bias=False) passes it."""
    (x, w, _), S, P = inputs(**shape), shape["S"], shape["P"]
    right = F.conv2d(x, w, None, S, P)
    G = torch.randn_like(right)
    try:
        yours = custom_conv2d(x, w, None, S, P)
        gradients = torch.autograd.grad(yours, (x, w), G)
    except (TypeError, AttributeError, RuntimeError) as e:
        expect(False, f"with bias=None it raises {type(e).__name__}: {str(e).splitlines()[0]}")
    compare("the output with bias=None", yours, right)
    for name, mine, its in zip("xw", gradients, torch.autograd.grad(right, (x, w), G), strict=True):
        compare(f"the gradient of {name} with bias=None", mine, its)


def check_in_place(layer: nn.Module, x: Tensor) -> None:
    """SimpleNet has nn.ReLU(inplace=True) behind each convolution: the output must be no view."""
    try:
        F.relu_(layer(x)).sum().backward()
    except RuntimeError as e:
        problem = f"an in-place ReLU on the output raises: {str(e).splitlines()[0][:90]}"
        expect(False, f"{problem}... Return a new tensor: end forward with .clone()")


def check_module(shape: dict[str, int]) -> None:
    """CustomConv2d with the weights of an nn.Conv2d: the same output, the same training step."""
    arguments = {"kernel_size": shape["K"], "stride": shape["S"], "padding": shape["P"]}
    right = nn.Conv2d(shape["C_i"], shape["C_o"], **arguments).double()
    yours = CustomConv2d(shape["C_i"], shape["C_o"], **arguments).double()
    names = sorted(name for name, _ in yours.named_parameters())
    expect(names == ["bias", "weight"], f"CustomConv2d has parameters {names}, not weight and bias")
    for parameter in ("weight", "bias"):
        mine, torchs = getattr(yours, parameter), getattr(right, parameter)
        expect(mine.shape == torchs.shape, f"CustomConv2d.{parameter} is {tuple(mine.shape)}")
        expect(mine.isfinite().all().item(), f"CustomConv2d.{parameter} is not initialised")
    yours.load_state_dict(right.state_dict())
    x = inputs(**shape)[0].detach()  # images require no gradient
    for layer in (yours, right):
        layer(x).square().sum().backward()
    compare("the output of CustomConv2d", yours(x), right(x))
    for parameter in ("weight", "bias"):
        mine, torchs = getattr(yours, parameter).grad, getattr(right, parameter).grad
        compare(f"CustomConv2d.{parameter}.grad", mine, torchs)
    check_in_place(yours, x)


def main() -> None:
    """All checks, in order."""
    torch.manual_seed(2024)
    small = [{**SMALL, "K": K, "S": S, "P": P} for K, S, P in VARIANTS]
    for shape in (STATED, *small):
        print("Testing " + " ".join(f"{name}={size}" for name, size in shape.items()))
        check_forward(shape)
        print("  forward pass: passed")
        check_gradients(shape, fast=shape is STATED)
        print("  gradients of the input, the weight and the bias: passed")
    print("Testing bias=None")
    check_without_bias(STATED)
    print("  forward pass and gradients: passed")
    print("Testing CustomConv2d")
    check_module(STATED)
    print("  module wrapper: passed")
    print("All passed! End of testing.")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # an encoding may lack characters of the output
        stream.reconfigure(errors="replace")
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
