"""The assignment before anyone worked on it, in our words: what is given, and what is left open."""

import torch
import torch.nn as nn
from torch.autograd import Function
from torch.nn.modules.utils import _pair

from custom_blocks import MLP, DropPath, PatchEmbed, window_partition, window_unpartition


class CustomConv2DFunction(Function):
    @staticmethod
    def forward(ctx, input_feats, weight, bias, stride=1, padding=0):
        assert weight.size(2) == weight.size(3)
        ctx.stride, ctx.padding = stride, padding
        ctx.save_for_backward(input_feats, weight, bias)
        return output  # noqa: F821 - to be written

    @staticmethod
    def backward(ctx, grad_output):
        input_feats, weight, bias = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum((0, 2, 3))
        return grad_input, grad_weight, grad_bias, None, None


custom_conv2d = CustomConv2DFunction.apply


class CustomConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0,
                 dilation=1, groups=1, bias=True):  # fmt: skip
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *_pair(kernel_size)))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x):
        return custom_conv2d(x, self.weight, self.bias, self.stride, self.padding)


class SimpleNet(nn.Module):
    def __init__(self, conv_op=nn.Conv2d, num_classes=100):
        super().__init__()
        self.features = nn.Sequential(
            conv_op(3, 64, kernel_size=7, stride=2, padding=3), nn.ReLU(inplace=True)
        )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.fc(self.avgpool(self.features(x)).flatten(1))


default_cnn_model = SimpleNet


class Attention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=True):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return x


class TransformerBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio=4.0, qkv_bias=True, drop_path=0.0,
                 norm_layer=nn.LayerNorm, act_layer=nn.GELU, window_size=0):  # fmt: skip
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp = MLP(dim, int(dim * mlp_ratio), act_layer=act_layer)
        self.window_size = window_size

    def forward(self, x):
        shortcut, x = x, self.norm1(x)
        if self.window_size > 0:
            hw = x.shape[1:3]
            x, pad_hw = window_partition(x, self.window_size)
        x = self.attn(x)
        if self.window_size > 0:
            x = window_unpartition(x, self.window_size, pad_hw, hw)
        x = shortcut + self.drop_path(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SimpleViT(nn.Module):
    def __init__(self, img_size=128, num_classes=100, patch_size=16, embed_dim=192):
        super().__init__()
        patch = (patch_size, patch_size)
        self.patch_embed = PatchEmbed(kernel_size=patch, stride=patch, embed_dim=embed_dim)
        side = img_size // patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, embed_dim))

    def forward(self, x):
        return self.patch_embed(x) + self.pos_embed


default_vit_model = SimpleViT


class PGDAttack:
    def __init__(self, loss_fn, num_steps=10, step_size=0.01, epsilon=0.1):
        self.loss_fn, self.num_steps = loss_fn, num_steps
        self.step_size, self.epsilon = step_size, epsilon

    def perturb(self, model, input):
        output = input.clone()
        input.requires_grad = False
        return output


default_attack = PGDAttack
