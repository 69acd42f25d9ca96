"""Transformer parts that are not part of the exercise: patches, windows, MLP, stochastic depth.

Tokens keep their place on the image grid throughout: `(B, H, W, C)`, as in ViTDet
(Li et al., 2022, "Exploring Plain Vision Transformer Backbones for Object Detection").

The editions 2022 and 2023 of the assignment import Attention, TransformerBlock and Mlp from here;
from 2024 on they are the student's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

__all__ = [
    "MLP",
    "Attention",
    "DropPath",
    "Mlp",
    "PatchEmbed",
    "TransformerBlock",
    "drop_path",
    "trunc_normal_",
    "window_partition",
    "window_unpartition",
]


class PatchEmbed(nn.Module):
    """One linear map per image patch: `(B, in_chans, H, W)` -> `(B, H', W', embed_dim)`."""

    def __init__(
        self,
        kernel_size: tuple[int, int] = (16, 16),
        stride: tuple[int, int] = (16, 16),
        padding: tuple[int, int] = (0, 0),
        in_chans: int = 3,
        embed_dim: int = 768,
    ):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, in_chans, H, W)` -> one token per patch `(B, H', W', embed_dim)`."""
        (h, w), (top, left) = self.proj.kernel_size, self.proj.padding
        if self.proj.stride != (h, w):
            return self.proj(x).permute(0, 2, 3, 1)  # (B, H', W', C)
        # patches do not overlap: a matrix product, whose image gradient is four times as fast
        x = F.pad(x, (left, left, top, top))
        H, W = x.shape[2] // h, x.shape[3] // w
        x = x[:, :, : H * h, : W * w].unflatten(3, (W, w)).unflatten(2, (H, h))
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, H', W', in_chans h w)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


def window_partition(x: Tensor, window_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Cut `(B, H, W, C)` into windows, padded with zeros at the bottom and the right.

    Returns the windows `(B * number of windows, window_size, window_size, C)` and the padded
    height and width.
    """
    B, H, W, C = x.shape
    ws = window_size
    x = F.pad(x, (0, 0, 0, -W % ws, 0, -H % ws))
    Hp, Wp = x.shape[1:3]
    x = x.reshape(B, Hp // ws, ws, Wp // ws, ws, C).transpose(2, 3)
    return x.reshape(-1, ws, ws, C), (Hp, Wp)


def window_unpartition(
    windows: Tensor, window_size: int, pad_hw: tuple[int, int], hw: tuple[int, int]
) -> Tensor:
    """Undo `window_partition`, dropping its padding: windows -> `(B, H, W, C)`."""
    (Hp, Wp), (H, W), ws = pad_hw, hw, window_size
    x = windows.reshape(-1, Hp // ws, Wp // ws, ws, ws, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, Hp, Wp, windows.shape[-1])[:, :H, :W].contiguous()


class MLP(nn.Module):
    """Two linear layers with a non-linearity between them, over the last dimension."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
    ):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features or in_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features or in_features, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(..., in_features)` -> `(..., out_features)`."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


Mlp = MLP  # its name in the editions 2022 and 2023


def drop_path(
    x: Tensor, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True
) -> Tensor:
    """Zero whole samples with probability `drop_prob`, so that a residual branch is skipped.

    With `scale_by_keep` the survivors grow by 1 / (1 - drop_prob), which keeps the mean.
    Stochastic depth: Huang et al., 2016, "Deep Networks with Stochastic Depth".
    """
    if drop_prob == 0.0 or not training:
        return x
    keep = 1.0 - drop_prob
    mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
    return x * (mask / keep if scale_by_keep and keep > 0.0 else mask)


class DropPath(nn.Module):
    """`drop_path` as a module: active in training mode only."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """`(B, ...)` -> the same shape; in evaluation mode x itself."""
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)

    def extra_repr(self) -> str:
        """The text in `print(model)`."""
        return f"drop_prob={self.drop_prob:g}"


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of a grid: `(B, H, W, C)` -> `(B, H, W, C)`.

    Vaswani et al., 2017, "Attention Is All You Need", section 3.2.2.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: bool `(B, H, W)`, true where a token may be attended to."""
        B, H, W, _ = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        keys = None if mask is None else mask.reshape(B, 1, 1, H * W)
        out = F.scaled_dot_product_attention(*qkv, attn_mask=keys)  # (B, heads, N, head_dim)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class TransformerBlock(nn.Module):
    """Pre-norm block, attention then MLP, each a residual branch: `(B, H, W, C)` -> the same.

    With `window_size` > 0 a token attends only to those of its window; padding is masked.
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
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.mlp = MLP(dim, int(dim * mlp_ratio), act_layer=act_layer)
        self.drop_path = DropPath(drop_path)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(B, H, W, C)` -> `(B, H, W, C)`: attention, then MLP, both residual."""
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        """Attention over all tokens, or within windows."""
        if self.window_size == 0:
            return self.attn(x)
        H, W = x.shape[1:3]
        windows, pad_hw = window_partition(x, self.window_size)
        real, _ = window_partition(x.new_ones(*x.shape[:3], 1), self.window_size)  # 0 where padded
        out = self.attn(windows, real.squeeze(-1) > 0)
        return window_unpartition(out, self.window_size, pad_hw, (H, W))
