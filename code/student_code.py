"""A complete solution of the assignment, in one file that also works in the course's tree.

Part I    a 2-D convolution from matrix products, and SimpleNet
Part II   self-attention, windowed transformer blocks, SimpleViT
Part III  adversarial samples by PGD, and the image grid that shows them
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_blocks import (
    MLP,
    DropPath,
    PatchEmbed,
    trunc_normal_,
    window_partition,
    window_unpartition,
)

# A network's input is (pixel - mean) / std, with pixels in [0, 1] and one value per channel.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# ---------------------------------------------------------------------------------------------
# Part I: the convolution
#
# A convolution is a matrix product. Let x (N, C_i, H, W) be padded with P zeros on each side and
# w (C_o, C_i, K, K) slide over it in steps of S; there are H_o = (H + 2P - K) // S + 1 positions
# along the height, W_o along the width, L = H_o W_o in an image. The output is
#
#     y[n, o, i, j] = b[o] + sum_{c, u, v} w[o, c, u, v] x[n, c, i S + u - P, j S + v - P]
#
# The K K C_i values under the kernel at one position form a row of X, one row per position
# ("im2col"). The weights are flattened in the same order:
#
#     Y = X Wᵀ + 1 bᵀ          X (N L, K K C_i)    W (C_o, K K C_i)    Y (N L, C_o)
#
# For a loss l with the incoming gradient G = dl/dY (N L, C_o), the product rule
# dl = <G, dY> = <G, X dWᵀ> + <G, dX Wᵀ> + <G, 1 dbᵀ> gives all three gradients:
#
#     dl/dW = Gᵀ X    (C_o, K K C_i)    sum over positions of window times gradient
#     dl/dX = G W     (N L, K K C_i)    each pixel sums the entries copied from it ("col2im")
#     dl/db = Gᵀ 1    (C_o)
#
# For S = 1 that sum is also a convolution. Outputs h + P - u read pixel h, so dl/dx is g, padded
# with K - 1 - P, convolved with the kernel rotated by 180°, with C_i and C_o swapped.
#
# X is K K times as large as x. It is built for a few images at a time, so that it fits in the
# cache, and built again in backward instead of saved: only x and w are saved, as in nn.Conv2d.
# ---------------------------------------------------------------------------------------------


def _out_size(size: int, K: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - K) // stride + 1


def _empty_image(x: Tensor, w: Tensor, C: int, H: int, W: int) -> Tensor:
    """An empty (N, C, H, W), channels-last if x or w is, as nn.Conv2d chooses."""
    channels_last = (0, 2, 3, 1) in (x.dim_order(), w.dim_order())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((len(x), C, H, W), dtype=x.dtype, device=x.device, memory_format=layout)


def _rows(image: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H W, C): a view in either memory format."""
    return image.flatten(2).transpose(1, 2)


def _at_once(N: int, columns: int, device: torch.device) -> int:
    """The number of images (of N) to process at a time; X takes `columns` bytes per image.

    A CPU is fast while the X of each thread fits in its cache; a GPU is fast with large kernels of
    one shape: equal parts of at most 512 MB, one or two for a batch of 256 in SimpleNet.
    """
    if device.type == "cuda":
        parts = -(-N * columns // 2**29)  # rounded up
        return max(1, -(-N // max(1, parts)))
    return max(1, min(N, 2**22 * torch.get_num_threads() // max(1, columns)))


def _im2col(
    x: Tensor, y: Tensor, K: int, stride: int, padding: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over x (N, C_i, H, W) and y (N, C_o, H_o, W_o), a few images at a time.

    Yields X (., L, K K C_i), in memory that is reused, and Y (., L, C_o), a view of y.
    """
    N, C, H, W = x.shape
    H_o, W_o = y.shape[2:]
    step = _at_once(N, H_o * W_o * K * K * C * x.element_size(), x.device)
    Ys = _rows(y).split(step)
    if K == stride == 1 and padding == 0:  # each window is one pixel: no copy needed
        yield from zip(_rows(x).split(step), Ys, strict=True)
        return
    # channels last: the K C values of a window's row are contiguous
    padded = x.new_zeros(step, H + 2 * padding, W + 2 * padding, C)
    inside = padded[:, padding : padding + H, padding : padding + W]
    windows = padded.unfold(1, K, stride).unfold(2, K, stride).permute(0, 1, 2, 4, 5, 3)
    columns = x.new_empty(windows.shape)  # (step, H_o, W_o, K, K, C)
    X = columns.view(step, H_o * W_o, K * K * C)
    for images, Y in zip(x.permute(0, 2, 3, 1).split(step), Ys, strict=True):
        if len(Y) < step:  # the last, smaller part
            inside, windows, columns, X = (t[: len(Y)] for t in (inside, windows, columns, X))
        inside.copy_(images)
        columns.copy_(windows)
        yield X, Y


def _outside_compile(function: Callable) -> Callable:
    """Break torch.compile's graph here, since it would unroll the loop over images.

    torch.compiler.disable as a decorator would import the compiler (seconds) in every process.
    """

    @functools.wraps(function)
    def call(*args):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args)
        return function(*args)

    return call


@_outside_compile
def _convolve(x: Tensor, w: Tensor, b: Tensor | None, stride: int, padding: int, y: Tensor):
    """Y = X Wᵀ + 1 bᵀ, written to y (N, C_o, H_o, W_o)."""
    C_o, C_i, K, _ = w.shape
    W = w.permute(2, 3, 1, 0).contiguous().view(K * K * C_i, C_o)
    for X, Y in _im2col(x, y, K, stride, padding):
        # out= is not affected by autocast; a contiguous one keeps oneDNN's kernels fast
        if Y.is_contiguous():
            torch.mm(X.flatten(0, 1), W, out=Y.flatten(0, 1))
        else:
            torch.bmm(W.t().expand(len(X), -1, -1), X.transpose(1, 2), out=Y.transpose(1, 2))
        if b is not None:
            Y += b
    return y


@_outside_compile
def _weight_gradient(g: Tensor, x: Tensor, K: int, stride: int, padding: int) -> Tensor:
    """dl/dW = Gᵀ X, as (C_o, C_i, K, K)."""
    C_o, C_i = g.shape[1], x.shape[1]
    part = g.new_empty(C_o, K * K * C_i)
    W = torch.zeros_like(part, dtype=torch.promote_types(g.dtype, torch.float32))
    for X, G in _im2col(x, g, K, stride, padding):
        W += torch.mm(G.reshape(-1, C_o).t(), X.reshape(-1, K * K * C_i), out=part)
    return W.to(g.dtype).view(C_o, K, K, C_i).permute(0, 3, 1, 2)


@_outside_compile
def _input_gradient(g: Tensor, w: Tensor, stride: int, padding: int, x: Tensor) -> Tensor:
    """dl/dx, written to x (N, C_i, H, W): by a convolution if S = 1, else G W and col2im."""
    C_o, C_i, K, _ = w.shape
    if stride == 1 and padding < K and (K == 1 or C_o <= 4 * C_i):  # else col2im copies less
        return _convolve(g, w.flip(2, 3).transpose(0, 1), None, 1, K - 1 - padding, x)
    W = w.flatten(1).t()  # (C_i K K, C_o), the order that fold expects
    G = g.flatten(2)  # (N, C_o, L)
    step = _at_once(len(G), len(W) * G.shape[2] * g.element_size(), g.device)
    for images, G_n in zip(x.split(step), G.split(step), strict=True):
        X = g.new_empty(len(G_n), len(W), G.shape[2])
        torch.bmm(W.expand(len(G_n), -1, -1), G_n, out=X)
        images.copy_(F.fold(X, x.shape[2:], K, padding=padding, stride=stride))
    return x


# y, dl/dx and dl/dw are each linear in two of x, w and g, and <g, y> = <dl/dx, x> = <dl/dw, w>:
# the gradients of each are the other two. So the gradients can be differentiated again.


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, w, like, stride, padding):
        ctx.save_for_backward(g, w)
        ctx.stride, ctx.padding = stride, padding
        return _input_gradient(g, w, stride, padding, _empty_image(like, w, *like.shape[1:]))

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
        dx = _InputGradient.apply(g, w, x.detach(), S, P) if ctx.needs_input_grad[1] else None
        return dg, dx, None, None, None


class CustomConv2DFunction(torch.autograd.Function):
    """The 2-D convolution of nn.Conv2d, by matrix products.

    input_feats (N, C_i, H, W), weight (C_o, C_i, K, K), bias (C_o,) or None; stride and padding
    are integers. Returns (N, C_o, H_o, W_o).

    Raises:
        RuntimeError: shapes, dtypes or devices do not match, as in nn.Conv2d.
    """

    @staticmethod
    def forward(ctx, input_feats, weight, bias, stride=1, padding=0):
        """y = x * w + b; saves x and w."""
        ctx.save_for_backward(input_feats, weight)
        ctx.stride, ctx.padding = stride, padding
        x, w, b = _autocast(input_feats, weight, bias)
        _check(x, w, b, stride, padding)
        H_o, W_o = (_out_size(size, w.shape[2], stride, padding) for size in x.shape[2:])
        y = _empty_image(x, w, len(w), H_o, W_o)
        return _convolve(x, w, b, stride, padding, y)

    @staticmethod
    def backward(ctx, grad_output):
        """Gradients of x, w and b, where needed; None for stride and padding."""
        g = grad_output
        x, w = (t.to(g.dtype) for t in ctx.saved_tensors)  # the dtype under autocast
        S, P = ctx.stride, ctx.padding
        dx = _InputGradient.apply(g, w, x.detach(), S, P) if ctx.needs_input_grad[0] else None
        dw = _WeightGradient.apply(g, x, w.shape[2], S, P) if ctx.needs_input_grad[1] else None
        db = g.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None


custom_conv2d = CustomConv2DFunction.apply


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast to the dtype of torch.autocast, except float64, as native operations do."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _check(x, w, b, stride, padding) -> None:
    """Raise RuntimeError for inputs that nn.Conv2d rejects, and for kernels that are not square."""
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
    """nn.Conv2d for square kernels, by `custom_conv2d`: the same arguments and parameters.

    Raises:
        ValueError: groups or dilation is not 1, padding is a string, or a pair is unequal.
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
            raise ValueError("CustomConv2d supports only groups=1 and dilation=1; use nn.Conv2d")
        K = self.kernel_size
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, K, K))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as nn.Conv2d does: both uniform in ±1 / sqrt(K K C_i)."""
        bound = self.weight[0].numel() ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name
        """(N, C_i, H, W) -> (N, C_o, H_o, W_o)."""
        return custom_conv2d(input, self.weight, self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        """The arguments, as nn.Module prints them."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, bias={self.bias is not None}"
        )


def _one_int(name: str, value: int | tuple[int, int]) -> int:
    """`value` as one int; a pair must be equal."""
    values = set(value) if isinstance(value, tuple | list) else {value}
    if len(values) != 1 or not isinstance(number := values.pop(), int):
        raise ValueError(f"CustomConv2d needs one integer as {name}, got {value!r}")
    return number


# ---------------------------------------------------------------------------------------------
# Part I: SimpleNet
# ---------------------------------------------------------------------------------------------


class SimpleNet(nn.Module):
    """A small bottleneck CNN: `(N, 3, H, W)` -> logits `(N, num_classes)`, for H, W >= about 32.

    `conv_op` is `nn.Conv2d` or anything with its constructor, such as `CustomConv2d`.
    """

    def __init__(self, conv_op: type[nn.Module] = nn.Conv2d, num_classes: int = 100):
        super().__init__()
        self.features = nn.Sequential(
            conv_op(3, 64, kernel_size=7, stride=2, padding=3),  # 128 -> 64
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),  # 64 -> 32
            conv_op(64, 64, kernel_size=1, stride=1, padding=0),
            nn.ReLU(inplace=True),
            conv_op(64, 64, kernel_size=3, stride=1, padding=1),
            nn.ReLU(inplace=True),
            conv_op(64, 256, kernel_size=1, stride=1, padding=0),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),  # 32 -> 16
            conv_op(256, 128, kernel_size=1, stride=1, padding=0),
            nn.ReLU(inplace=True),
            conv_op(128, 128, kernel_size=3, stride=1, padding=1),
            nn.ReLU(inplace=True),
            conv_op(128, 512, kernel_size=1, stride=1, padding=0),
            nn.ReLU(inplace=True),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming normal initialisation (He et al., 2015), for any `conv_op`."""
        for name, parameter in self.features.named_parameters():
            if name.endswith("weight"):
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, 3, H, W)` -> logits `(N, num_classes)`."""
        x = self.avgpool(self.features(x))  # (N, 512, 1, 1)
        return self.fc(x.flatten(1))


default_cnn_model = SimpleNet


# ---------------------------------------------------------------------------------------------
# Part II: attention and SimpleViT
# ---------------------------------------------------------------------------------------------


# Up to this number of tokens the explicit softmax is no slower than the fused kernel, forward and
# backward (CPU, 1 and 2 threads: 16 tokens -5 %, 64 tokens equal); at 256 the fused one is faster
# with MKL's products. With oneDNN's the explicit one is 2.5 times as fast at 64, 1.5 at 256.
MAX_TOKENS_EXPLICIT = 64


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of a grid: `(B, H, W, C)` -> `(B, H, W, C)`.

    Vaswani et al., 2017, "Attention Is All You Need", equation 1 and section 3.2.2.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: bool `(B, H, W)`, true for tokens to attend to, at least one per grid."""
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, head_dim)
        if mask is not None:
            mask = mask.reshape(B, 1, 1, H * W)
        if H * W <= MAX_TOKENS_EXPLICIT:
            scores = (q * self.scale) @ k.transpose(-2, -1)  # (B, heads, N, N)
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            out = scores.softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(B, H, W, C))


class TransformerBlock(nn.Module):
    """Pre-norm block: residual attention, then residual MLP, `(B, H, W, C)` -> `(B, H, W, C)`.

    With `window_size` > 0 a token attends only to tokens of its window. Windows at the border may
    be padded; padding is masked out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        window_size: int = 0,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = norm_layer(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio), act_layer=act_layer)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C)` -> `(B, H, W, C)`."""
        attend = self.attend_in_windows if self.window_size > 0 else self.attn
        x = x + self.drop_path(attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend_in_windows(self, x: Tensor) -> Tensor:
        """Attention within windows, `(B, H, W, C)` -> `(B, H, W, C)`."""
        B, H, W, _ = x.shape
        windows, pad_hw = window_partition(x, self.window_size)
        mask = None
        if pad_hw != (H, W):
            ones, _ = window_partition(x.new_ones(B, H, W, 1), self.window_size)
            mask = ones.squeeze(-1) > 0.5  # (B * windows, ws, ws); padding is zero
        return window_unpartition(self.attn(windows, mask), self.window_size, pad_hw, (H, W))


class SimpleViT(nn.Module):
    """A small vision transformer: `(N, in_chans, img_size, img_size)` -> `(N, num_classes)`.

    Patch and position embedding; `depth` blocks, those in `window_block_indexes` with window
    attention, the others with global attention; norm, mean over all tokens, linear head
    (Dosovitskiy et al., 2021; windows as in Li et al., 2022). The rate of stochastic depth grows
    linearly with depth, from 0 to `drop_path_rate` (Huang et al., 2016).
    """

    def __init__(
        self,
        img_size: int = 128,
        num_classes: int = 100,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.1,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        use_abs_pos: bool = True,
        window_size: int = 4,
        window_block_indexes: Sequence[int] = (0, 2),
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is no multiple of patch_size {patch_size}")
        self.img_size, self.patch_size = img_size, patch_size
        patch, grid = (patch_size, patch_size), img_size // patch_size
        self.patch_embed = PatchEmbed(patch, patch, in_chans=in_chans, embed_dim=embed_dim)
        self.pos_embed = None
        if use_abs_pos:
            self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, embed_dim))
        drop_path = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(
            TransformerBlock(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                drop_path[i],
                norm_layer,
                act_layer,
                window_size if i in window_block_indexes else 0,
            )
            for i in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from a truncated normal with standard deviation 0.02; zero biases."""
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Raise ValueError if the image size does not match the patches or position embedding."""
        H, W = x.shape[-2:]
        if self.pos_embed is not None and not H == W == self.img_size:
            size = self.img_size
            raise ValueError(f"images are {H}x{W} (height x width), expected {size}x{size}")
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"image size {H}x{W} is no multiple of the patch {self.patch_size}")
        x = self.patch_embed(x)  # (N, H', W', C)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=(1, 2)))


default_vit_model = SimpleViT


# ---------------------------------------------------------------------------------------------
# Data augmentation
# ---------------------------------------------------------------------------------------------


def get_train_transforms(normalize=None):
    """Augmentation: uint8 `(H, W, 3)` -> float `(3, 128, 128)`, normalised.

    normalize: the last transform, which the editions of 2022 and 2023 pass; default ImageNet's.
    """
    import custom_transforms as transforms  # imports OpenCV, which the networks do not need

    return transforms.Compose(
        [
            transforms.Scale(144),
            transforms.RandomHorizontalFlip(),
            transforms.RandomColor(0.15),
            transforms.RandomRotate(15),
            transforms.RandomSizedCrop(128),
            transforms.ToTensor(),
            normalize or transforms.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD)),
        ]
    )


def get_val_transforms(normalize=None):
    """Center crop: uint8 `(H, W, 3)` -> float `(3, 128, 128)`, normalised; `normalize` as above."""
    import custom_transforms as transforms  # imports OpenCV, which the networks do not need

    return transforms.Compose(
        [
            transforms.Scale(144),
            transforms.CenterCrop(128),
            transforms.ToTensor(),
            normalize or transforms.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD)),
        ]
    )


# ---------------------------------------------------------------------------------------------
# Part III: adversarial samples
# ---------------------------------------------------------------------------------------------


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """One value per channel as `(1, C, 1, 1)`, with the dtype and device of `like`."""
    if like.dim() != 4 or like.shape[1] != len(values):
        raise ValueError(
            f"mean and std have {len(values)} channels, the images are {tuple(like.shape)}: "
            f"expected (N, {len(values)}, H, W), or pass mean and std for these images"
        )
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


@contextmanager
def frozen_eval_mode(model: nn.Module) -> Iterator[None]:
    """Enable gradients, evaluation mode and frozen parameters; restore all three afterwards.

    With frozen parameters backward skips the gradients of the weights, which attacks do not use.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


class PGDAttack:
    """Projected gradient descent in the l_inf ball (Madry et al., 2018), in normalised units.

    By default the attack is targeted: it descends the loss of the class that is least likely for
    the clean image, the same class in all steps (Kurakin et al., 2017, section 2.3). With
    `targeted=False` it ascends the loss of the true label.

    `step_size` and `epsilon` are in the units of the normalised input, the same for every channel;
    `mean` and `std` of the normalisation determine the range of valid pixels.
    """

    def __init__(
        self,
        loss_fn: nn.Module,
        num_steps: int = 10,
        step_size: float = 0.01,
        epsilon: float = 0.1,
        *,
        targeted: bool = True,
        random_start: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        if num_steps < 0 or step_size < 0 or epsilon < 0:
            raise ValueError("num_steps, step_size and epsilon must not be negative")
        self.loss_fn = loss_fn
        self.num_steps = num_steps
        self.step_size = step_size
        self.epsilon = epsilon
        self.targeted = targeted
        self.random_start = random_start
        self.mean = mean
        self.std = std

    def perturb(self, model: nn.Module, input: Tensor, label: Tensor | None = None) -> Tensor:
        """Adversarial images for the normalised `input` `(N, C, H, W)`, detached.

        label: `(N,)`, the target, or the true class if untargeted; by default the least, or the
        most, likely class of the clean image. The model's mode, its parameters, their gradients
        and `input` do not change, even if the model raises an error.
        """
        with frozen_eval_mode(model):
            # at least float32: bfloat16 near 2 has a spacing of 0.016, above the step of 0.01
            x = input.detach().to(torch.promote_types(input.dtype, torch.float32), copy=True)
            lower, upper = self.bounds(x)
            if label is None:
                label = self.default_label(model, input.detach().clone())
            label = label.detach().clone()  # an inference tensor cannot be saved for backward
            x_adv = x
            if self.random_start and self.num_steps > 0:
                x_adv = lower + (upper - lower) * torch.rand_like(x)
            direction = -1.0 if self.targeted else 1.0
            for _ in range(self.num_steps):
                x_adv = x_adv.detach().requires_grad_(True)
                loss = self.loss_fn(model(x_adv.to(input.dtype)), label).sum()
                (gradient,) = torch.autograd.grad(loss, x_adv)
                x_adv = x_adv.detach() + direction * self.step_size * gradient.sign()
                x_adv = torch.minimum(torch.maximum(x_adv, lower), upper)
            return x_adv.detach().to(input.dtype)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of every pixel: within epsilon of x and in the valid range."""
        mean, std = per_channel(self.mean, x), per_channel(self.std, x)
        darkest, brightest = (0.0 - mean) / std, (1.0 - mean) / std
        lower = torch.maximum(x - self.epsilon, darkest)
        return lower, torch.minimum(x + self.epsilon, brightest)

    @torch.no_grad()
    def default_label(self, model: nn.Module, x: Tensor) -> Tensor:
        """`(N,)`: the least likely class of x, or the most likely one if untargeted."""
        logits = model(x)
        return logits.argmin(dim=1) if self.targeted else logits.argmax(dim=1)


default_attack = PGDAttack


class GradientSaliency:
    """Which pixels drive the prediction (Simonyan et al., 2014, "Deep Inside Convolutional
    Networks", section 3): `default_attention` of the editions 2022 and 2023."""

    def __init__(self, loss_fn: nn.Module):
        self.loss_fn = loss_fn

    def explain(self, model: nn.Module, input: Tensor) -> Tensor:  # noqa: A002 - the course's name
        """Saliency maps (N, 1, H, W) >= 0 for normalised images (N, C, H, W).

        The gradient of the predicted class's loss: its largest magnitude over the channels. The
        model, its parameters' gradients and `input` do not change.
        """
        with frozen_eval_mode(model):
            x = input.detach().clone().requires_grad_(True)
            logits = model(x)
            loss = self.loss_fn(logits, logits.argmax(dim=1)).sum()
            (gradient,) = torch.autograd.grad(loss, x)
        return gradient.abs().amax(dim=1, keepdim=True)


default_attention = GradientSaliency


def vis_grid(input: Tensor, n_rows: int = 10, vis_output: Tensor | None = None) -> Tensor:
    """A normalised batch `(N, 3, H, W)` as one image `(3, H', W')` in [0, 1], on the CPU.

    Each row holds `n_rows` images (the course's name), separated by two black pixels.
    vis_output: saliency maps (N, 1, H, W); pixels are dimmed by them.
    """
    x = input.detach().cpu().float()
    x = (x * per_channel(IMAGENET_STD, x) + per_channel(IMAGENET_MEAN, x)).clamp(0, 1)
    if vis_output is not None:
        maps = vis_output.detach().cpu().float()
        x = x * (maps / maps.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)).sqrt()
    columns = min(n_rows, len(x))
    x = F.pad(x, (2, 0, 2, 0))  # black, above and left of every image
    x = torch.cat([x, x.new_zeros(-len(x) % columns, *x.shape[1:])])
    x = x.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # (3, rows, H, columns, W)
    return F.pad(x.flatten(3, 4).flatten(1, 2), (0, 2, 0, 2))


default_visfunction = vis_grid
