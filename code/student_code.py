"""A whole answer to the assignment, in one file that also works in the course's own tree.

Part I    a 2-D convolution from matrix products, and SimpleNet
Part II   self-attention, windowed transformer blocks, SimpleViT
Part III  PGD adversarial samples and the pictures that show them
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

# ---------------------------------------------------------------------------------------------
# Part I: the convolution
#
# A convolution is a matrix product. Let x (N, C_i, H, W) be padded with P zeros on each side and
# w (C_o, C_i, K, K) slide over it in steps of S; there are H_o = (H + 2P - K) // S + 1 positions
# along the height, W_o along the width, L = H_o W_o in an image. One output is
#
#     y[n, o, i, j] = b[o] + sum_{c, u, v} w[o, c, u, v] x[n, c, i S + u - P, j S + v - P]
#
# Lay the K K C_i numbers under the kernel at one position out as a row, and the rows of all
# positions below one another ("im2col"); lay the weights out in the same order:
#
#     Y = X Wᵀ + 1 bᵀ          X (N L, K K C_i)    W (C_o, K K C_i)    Y (N L, C_o)
#
# For a loss l with the incoming gradient G = dl/dY (N L, C_o), the product rule
# dl = <G, dY> = <G, X dWᵀ> + <G, dX Wᵀ> + <G, 1 dbᵀ> gives all three gradients:
#
#     dl/dW = Gᵀ X    (C_o, K K C_i)    each position adds its window, weighted by its gradient
#     dl/dX = G W     (N L, K K C_i)    each pixel then sums the entries copied from it ("col2im")
#     dl/db = Gᵀ 1    (C_o)
#
# With S = 1 that sum is a convolution again: pixel h was read by the outputs h + P - u, so dl/dx
# is g, padded with K - 1 - P, convolved with the kernel turned by 180°, C_i and C_o swapped.
#
# X has K K times the numbers of x. It is built for a few images at a time, which stay in the
# cache, and built anew in backward instead of saved: only x and w are kept, as in nn.Conv2d.
# ---------------------------------------------------------------------------------------------


def _chunk(columns: int, device: torch.device) -> int:
    """How many images to work on at a time, if the X of one image takes `columns` bytes.

    A CPU is fast while X stays in its cache; a GPU wants few, large kernels.
    """
    budget = 2**28 if device.type == "cuda" else 2**21
    return max(1, budget // max(1, columns))


def _out_size(size: int, K: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - K) // stride + 1


def _new_image(like: torch.Tensor, w: torch.Tensor, C: int, H: int, W: int) -> torch.Tensor:
    """Memory for (N, C, H, W), channels-last if `like` or w is: the choice of nn.Conv2d."""
    channels_last = (0, 2, 3, 1) in (like.dim_order(), w.dim_order())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    size = (len(like), C, H, W)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _rows(image: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) as (N, H W, C): a view in either memory format."""
    return image.flatten(2).transpose(1, 2)


def _im2col(
    x: torch.Tensor, K: int, stride: int, padding: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Walk over x (N, C, H, W): yield a few images n, a slice, and their X (len(n), L, K K C).

    Every X is written to the same memory: use one before asking for the next.
    """
    N, C, H, W = x.shape
    H_o, W_o = (_out_size(size, K, stride, padding) for size in (H, W))
    step = _chunk(H_o * W_o * K * K * C * x.element_size(), x.device)
    chunks = [slice(n, min(n + step, N)) for n in range(0, N, step)]
    if K == stride == 1 and padding == 0:  # a window is a pixel: nothing to copy
        yield from ((n, _rows(x[n])) for n in chunks)
        return
    # channels last: the K C numbers of a window's row then lie side by side
    padded = x.new_zeros(min(step, N), H + 2 * padding, W + 2 * padding, C)
    windows = padded.unfold(1, K, stride).unfold(2, K, stride).permute(0, 1, 2, 4, 5, 3)
    columns = x.new_empty(windows.shape)  # (step, H_o, W_o, K, K, C)
    for n in chunks:
        m = n.stop - n.start
        padded[:m, padding : padding + H, padding : padding + W] = x[n].permute(0, 2, 3, 1)
        columns[:m] = windows[:m]
        yield n, columns[:m].view(m, H_o * W_o, K * K * C)


def _outside_compile(function: Callable) -> Callable:
    """Break torch.compile's graph here: it would unroll the loop over images.

    Not torch.compiler.disable as a decorator, which imports the compiler (seconds) for everyone.
    """

    @functools.wraps(function)
    def call(*args):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args)
        return function(*args)

    return call


@_outside_compile
def _convolve(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, stride: int, padding: int
) -> torch.Tensor:
    """Y = X Wᵀ + 1 bᵀ, as y (N, C_o, H_o, W_o)."""
    C_o, C_i, K, _ = w.shape
    y = _new_image(x, w, C_o, *(_out_size(size, K, stride, padding) for size in x.shape[2:]))
    W = w.permute(2, 3, 1, 0).contiguous().view(K * K * C_i, C_o)
    for n, X in _im2col(x, K, stride, padding):
        Y = _rows(y[n])
        torch.bmm(X, W.expand(len(X), -1, -1), out=Y)  # out=: autocast leaves it alone
        if b is not None:
            Y += b
    return y


@_outside_compile
def _weight_gradient(
    g: torch.Tensor, x: torch.Tensor, K: int, stride: int, padding: int
) -> torch.Tensor:
    """dl/dW = Gᵀ X, as (C_o, C_i, K, K)."""
    C_o, C_i = g.shape[1], x.shape[1]
    part = g.new_empty(C_o, K * K * C_i)
    total = torch.zeros_like(part, dtype=torch.promote_types(g.dtype, torch.float32))
    for n, X in _im2col(x, K, stride, padding):
        G = _rows(g[n]).reshape(-1, C_o)
        total += torch.mm(G.t(), X.reshape(len(G), -1), out=part)
    return total.to(g.dtype).view(C_o, K, K, C_i).permute(0, 3, 1, 2)


@_outside_compile
def _input_gradient(
    g: torch.Tensor, w: torch.Tensor, size: tuple[int, int], stride: int, padding: int
) -> torch.Tensor:
    """dl/dX = G W, gathered into x (N, C_i, H, W) by a convolution if S = 1, else by col2im."""
    C_o, C_i, K, _ = w.shape
    if stride == 1 and padding < K and (K == 1 or C_o <= 4 * C_i):  # else col2im moves less
        return _convolve(g, w.flip(2, 3).transpose(0, 1), None, 1, K - 1 - padding)
    x = _new_image(g, w, C_i, *size)
    W = w.flatten(1).t()  # (C_i K K, C_o): the order of fold
    L = g.shape[2] * g.shape[3]
    step = _chunk(len(W) * L * g.element_size(), g.device)
    for n in range(0, len(g), step):
        G = g[n : n + step].flatten(2)  # (., C_o, L)
        X = g.new_empty(len(G), len(W), L)
        torch.bmm(W.expand(len(G), -1, -1), G, out=X)
        x[n : n + step] = nn.functional.fold(X, size, K, padding=padding, stride=stride)
    return x


# y, dl/dx and dl/dw are each linear in two of x, w and g, and <g, y> = <dl/dx, x> = <dl/dw, w>: a
# gradient of any of the three is one of the other two. So the gradients can be differentiated too.


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, w, size, stride, padding):
        ctx.save_for_backward(g, w)
        ctx.stride, ctx.padding = stride, padding
        return _input_gradient(g, w, size, stride, padding)

    @staticmethod
    def backward(ctx, x):
        g, w = ctx.saved_tensors
        S, P = ctx.stride, ctx.padding
        dg = CustomConv2DFunction.apply(x, w, None, S, P) if ctx.needs_input_grad[0] else None
        dw = _WeightGradient.apply(g, x, w.shape[2], S, P) if ctx.needs_input_grad[1] else None
        return dg, dw, None, None, None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, x, K, stride, padding):
        ctx.save_for_backward(g, x)
        ctx.stride, ctx.padding = stride, padding
        return _weight_gradient(g, x, K, stride, padding)

    @staticmethod
    def backward(ctx, w):
        g, x = ctx.saved_tensors
        S, P = ctx.stride, ctx.padding
        dg = CustomConv2DFunction.apply(x, w, None, S, P) if ctx.needs_input_grad[0] else None
        dx = _InputGradient.apply(g, w, x.shape[2:], S, P) if ctx.needs_input_grad[1] else None
        return dg, dx, None, None, None


class CustomConv2DFunction(torch.autograd.Function):
    """A 2-D convolution written with matrix products; what nn.Conv2d computes.

    input_feats (N, C_i, H, W), weight (C_o, C_i, K, K), bias (C_o,) or None; stride and padding
    are integers. Returns (N, C_o, H_o, W_o).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, as nn.Conv2d does.
    """

    @staticmethod
    def forward(ctx, input_feats, weight, bias, stride=1, padding=0):
        ctx.save_for_backward(input_feats, weight)
        ctx.stride, ctx.padding = stride, padding
        x, w, b = _autocast(input_feats, weight, bias)
        _check(x, w, b, stride, padding)
        return _convolve(x, w, b, stride, padding)

    @staticmethod
    def backward(ctx, grad_output):
        g = grad_output
        x, w = (t.to(g.dtype) for t in ctx.saved_tensors)  # the dtype under autocast
        S, P = ctx.stride, ctx.padding
        dx = _InputGradient.apply(g, w, x.shape[2:], S, P) if ctx.needs_input_grad[0] else None
        dw = _WeightGradient.apply(g, x, w.shape[2], S, P) if ctx.needs_input_grad[1] else None
        db = g.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None


custom_conv2d = CustomConv2DFunction.apply


def _autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Under torch.autocast: cast to its dtype, float64 excepted, as native operations do."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _check(x, w, b, stride, padding) -> None:
    """Refuse what nn.Conv2d refuses, and what a square kernel with one stride cannot do."""
    if x.dim() != 4 or w.dim() != 4 or w.shape[2] != w.shape[3]:
        raise RuntimeError(
            "expected an input (N, C_i, H, W) and a square weight (C_o, C_i, K, K), "
            f"got {tuple(x.shape)} and {tuple(w.shape)}"
        )
    if x.shape[1] != w.shape[1]:
        raise RuntimeError(
            f"the weight {tuple(w.shape)} expects {w.shape[1]} input channels, "
            f"the input {tuple(x.shape)} has {x.shape[1]}"
        )
    if b is not None and b.shape != w.shape[:1]:
        raise RuntimeError(f"expected a bias of {len(w)} elements, got shape {tuple(b.shape)}")
    for name, t in (("weight", w), ("bias", b)):
        if t is not None and (t.dtype, t.device) != (x.dtype, x.device):
            raise RuntimeError(
                f"input ({x.dtype}, {x.device}) and {name} ({t.dtype}, {t.device}) differ"
            )
    if not (isinstance(stride, int) and isinstance(padding, int) and stride > 0 <= padding):
        raise RuntimeError(f"stride {stride} and padding {padding} must be integers, > 0 and >= 0")
    H, W = (size + 2 * padding for size in x.shape[2:])
    if w.shape[2] > min(H, W):
        raise RuntimeError(f"the kernel ({w.shape[2]}) is larger than the padded input ({H} x {W})")


class CustomConv2d(nn.Module):
    """nn.Conv2d for square kernels, by `custom_conv2d`: same arguments, parameters and start.

    Raises:
        ValueError: groups or dilation other than 1, a padding mode, or an unequal pair.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = _one_int("kernel_size", kernel_size)
        self.stride, self.padding = _one_int("stride", stride), _one_int("padding", padding)
        if groups != 1 or _one_int("dilation", dilation) != 1:
            raise ValueError("CustomConv2d knows groups=1 and dilation=1 only; use nn.Conv2d")
        K = self.kernel_size
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, K, K))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The start of nn.Conv2d: both uniform in ±1 / sqrt(K K C_i)."""
        bound = self.weight[0].numel() ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in nn.Conv2d
        return custom_conv2d(input, self.weight, self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, bias={self.bias is not None}"
        )


def _one_int(name: str, value: int | tuple[int, int]) -> int:
    """An int, or the int of an equal pair."""
    values = set(value) if isinstance(value, tuple | list) else {value}
    if len(values) != 1 or not isinstance(number := values.pop(), int):
        raise ValueError(f"CustomConv2d needs one integer as {name}, got {value!r}")
    return number


# ---------------------------------------------------------------------------------------------
# Part I: SimpleNet
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Part II: attention and SimpleViT
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Data augmentation
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# Part III: adversarial samples
# ---------------------------------------------------------------------------------------------
