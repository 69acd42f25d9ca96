"""An answer as students write it in the course's skeleton: the contract's names and no more.

Its convolution unfolds whole batches, its block masks no padding, its attack re-picks its label.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import Function
from torch.nn.modules.utils import _pair
from torchvision.utils import make_grid

import custom_transforms as transforms
from custom_blocks import (
    MLP,
    DropPath,
    PatchEmbed,
    trunc_normal_,
    window_partition,
    window_unpartition,
)
from utils import AverageMeter, load_image, resize_image  # noqa: F401 - students import them


class CustomConv2DFunction(Function):
    @staticmethod
    def forward(ctx, input_feats, weight, bias, stride=1, padding=0):
        k = weight.shape[2]
        ctx.stride, ctx.padding, ctx.size = stride, padding, input_feats.shape[2:]
        columns = F.unfold(input_feats, k, padding=padding, stride=stride)
        ctx.save_for_backward(columns, weight, bias)
        out = weight.flatten(1) @ columns
        if bias is not None:
            out = out + bias[:, None]
        sides = [(size + 2 * padding - k) // stride + 1 for size in ctx.size]
        return F.fold(out, sides, 1)

    @staticmethod
    def backward(ctx, grad_output):
        columns, weight, bias = ctx.saved_tensors
        grad = grad_output.flatten(2)
        grad_columns = weight.flatten(1).t() @ grad
        grad_input = F.fold(
            grad_columns, ctx.size, weight.shape[2], padding=ctx.padding, stride=ctx.stride
        )
        grad_weight = torch.einsum("nop,nip->oi", grad, columns).view_as(weight)
        grad_bias = grad.sum((0, 2)) if bias is not None else None
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
    """The student's own layers: other names and shapes than the contract's SimpleNet."""

    def __init__(self, conv_op=nn.Conv2d, num_classes=100):
        super().__init__()
        self.body = nn.Sequential(
            conv_op(3, 16, kernel_size=5, stride=4, padding=2),
            nn.ReLU(inplace=True),
            conv_op(16, 24, kernel_size=3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
        )
        self.classifier = nn.Linear(96, num_classes)

    def forward(self, x):
        x = self.body(x)
        return self.classifier(x.view(x.size(0), -1))


default_cnn_model = SimpleNet


class Attention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, H, W, C))


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
            H, W = x.shape[1], x.shape[2]
            x, pad_hw = window_partition(x, self.window_size)
            x = window_unpartition(self.attn(x), self.window_size, pad_hw, (H, W))
        else:
            x = self.attn(x)
        x = shortcut + self.drop_path(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SimpleViT(nn.Module):
    def __init__(self, img_size=128, num_classes=100, patch_size=32, embed_dim=24):
        super().__init__()
        self.patch_embed = PatchEmbed(
            kernel_size=(patch_size, patch_size), stride=(patch_size, patch_size),
            in_chans=3, embed_dim=embed_dim,
        )  # fmt: skip
        side = img_size // patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, embed_dim))
        trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(
            [TransformerBlock(embed_dim, 2, drop_path=0.1, window_size=w) for w in (3, 0)]
        )
        self.fc = nn.Linear(embed_dim, num_classes)

    def forward(self, x):
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((1, 2)))


default_vit_model = SimpleViT


def get_train_transforms():
    normalize = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    return transforms.Compose([
        transforms.Scale(160), transforms.RandomHorizontalFlip(), transforms.RandomColor(0.15),
        transforms.RandomRotate(15), transforms.RandomSizedCrop(128), transforms.ToTensor(),
        normalize,
    ])  # fmt: skip


def get_val_transforms():
    normalize = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    return transforms.Compose(
        [transforms.Scale(160), transforms.CenterCrop(128), transforms.ToTensor(), normalize]
    )


class PGDAttack:
    def __init__(self, loss_fn, num_steps=10, step_size=0.01, epsilon=0.1):
        self.loss_fn, self.num_steps = loss_fn, num_steps
        self.step_size, self.eps = step_size, epsilon

    def perturb(self, model, input):
        output = input.clone()
        for _ in range(self.num_steps):
            output = output.detach().requires_grad_(True)
            logits = model(output)
            self.loss_fn(logits, logits.argmin(1)).backward()
            output = output - self.step_size * output.grad.sign()
            output = torch.max(torch.min(output, input + self.eps), input - self.eps)
        model.zero_grad()
        return output.detach()


default_attack = PGDAttack


def vis_grid(input, n_rows=10):
    return make_grid(input.cpu(), nrow=n_rows, normalize=True)


default_visfunction = vis_grid
