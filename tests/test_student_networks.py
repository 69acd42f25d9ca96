"""SimpleNet, SimpleViT, their blocks and transforms: names, shapes, arithmetic, learning."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import student_code
from custom_blocks import MLP, DropPath, PatchEmbed, drop_path, trunc_normal_
from student_code import SimpleNet, SimpleViT

CODE = Path(student_code.__file__).parent

SIMPLENET = {
    "features.0": (64, 3, 7, 7),
    "features.3": (64, 64, 1, 1),
    "features.5": (64, 64, 3, 3),
    "features.7": (256, 64, 1, 1),
    "features.10": (128, 256, 1, 1),
    "features.12": (128, 128, 3, 3),
    "features.14": (512, 128, 1, 1),
    "fc": (7, 512),
}


def test_importing_needs_torch_alone():
    script = (
        "import sys\n"
        "absent = ['cv2', 'torchvision', 'PIL', 'tensorboard', 'matplotlib', 'utils']\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "import student_code, custom_blocks, deepvision.models.scene_net\n"
        "import deepvision.attacks.diagnostics, deepvision.training.objectives\n"
        "import deepvision.evaluation.saliency"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=CODE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_simplenet_has_the_parameters_of_old_checkpoints():
    shapes = {name: tuple(p.shape) for name, p in SimpleNet(num_classes=7).state_dict().items()}
    expected = {f"{name}.weight": shape for name, shape in SIMPLENET.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in SIMPLENET.items()}
    assert shapes == expected


def simplenet_by_hand(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    def conv(x, i, **kwargs):
        return F.conv2d(x, p[f"features.{i}.weight"], p[f"features.{i}.bias"], **kwargs).relu()

    x = F.max_pool2d(conv(x, 0, stride=2, padding=3), 3, 2, 1)
    x = conv(conv(conv(x, 3), 5, padding=1), 7)
    x = F.max_pool2d(x, 3, 2, 1)
    x = conv(conv(conv(x, 10), 12, padding=1), 14)
    return F.linear(x.mean(dim=(2, 3)), p["fc.weight"], p["fc.bias"])


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (33, 47)])
def test_simplenet_computes_the_contracts_layers(size):
    torch.manual_seed(0)
    net, x = SimpleNet(num_classes=7).double(), torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(net(x), simplenet_by_hand(net.state_dict(), x))


class OddConv(nn.Module):
    """Not an `nn.Conv2d`, and badly initialised."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.ones(out_channels))
        self.how = {"stride": stride, "padding": padding}

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, **self.how)


@pytest.mark.parametrize("conv_op", [nn.Conv2d, OddConv])
def test_simplenet_starts_from_kaimings_normal_whatever_the_convolution(conv_op):
    torch.manual_seed(0)
    net = SimpleNet(conv_op)
    convolutions = [layer for layer in net.features if isinstance(layer, conv_op)]
    assert len(convolutions) == 7
    for layer in convolutions:
        out_channels, _, kernel, _ = layer.weight.shape
        std = math.sqrt(2 / (out_channels * kernel**2))
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
        assert abs(layer.weight.mean().item()) < 0.1 * std
        assert not layer.bias.any()


def test_default_models():
    assert student_code.default_cnn_model is SimpleNet
    assert student_code.default_vit_model is SimpleViT


def test_vit_parameters():
    net = SimpleViT(num_classes=10)
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    assert shapes["pos_embed"] == (1, 8, 8, 192)
    assert shapes["patch_embed.proj.weight"] == (192, 3, 16, 16)
    assert shapes["blocks.3.attn.qkv.weight"] == (576, 192)
    assert shapes["blocks.3.attn.proj.weight"] == (192, 192)
    assert shapes["head.weight"] == (10, 192)
    block = 2 * 2 * 192 + (192 + 1) * 576 + (192 + 1) * 192 + (192 + 1) * 768 + (768 + 1) * 192
    patches, rest = (3 * 16**2 + 1) * 192, 64 * 192 + 2 * 192 + 193 * 10
    assert sum(p.numel() for p in net.parameters()) == patches + 4 * block + rest
    assert net(torch.randn(2, 3, 128, 128)).shape == (2, 10)


def test_vit_places_windows_and_stochastic_depth():
    net = SimpleViT(depth=5, drop_path_rate=0.2, window_size=3, window_block_indexes=(1, 4))
    assert [block.window_size for block in net.blocks] == [0, 3, 0, 0, 3]
    assert isinstance(net.blocks[0].drop_path, nn.Identity)
    rates = [block.drop_path.drop_prob for block in net.blocks[1:]]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2])


def test_vit_starts_with_small_positions_and_zero_biases():
    net = SimpleViT()
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert net.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not net.blocks[0].mlp.fc1.bias.any()


def shuffled_patches(x: torch.Tensor, patch: int) -> torch.Tensor:
    columns = F.unfold(x, patch, stride=patch)
    columns = columns[..., torch.randperm(columns.shape[-1])]
    return F.fold(columns, x.shape[-2:], patch, stride=patch)


@pytest.mark.parametrize("use_abs_pos", [True, False])
def test_vit_knows_where_a_patch_is_by_its_position_embedding_alone(use_abs_pos):
    torch.manual_seed(0)
    net = SimpleViT(32, patch_size=8, use_abs_pos=use_abs_pos, window_block_indexes=()).eval()
    x = torch.randn(2, 3, 32, 32)
    equal = torch.allclose(net(x), net(shuffled_patches(x, 8)), atol=1e-5)
    assert equal != use_abs_pos


def test_vit_sizes():
    with pytest.raises(ValueError, match="96x128 .*expected 128x128"):
        SimpleViT()(torch.randn(1, 3, 96, 128))
    with pytest.raises(ValueError, match="no multiple of patch_size"):
        SimpleViT(img_size=100)
    free = SimpleViT(use_abs_pos=False, num_classes=5)
    assert free(torch.randn(1, 3, 80, 112)).shape == (1, 5)  # 5x7 tokens in windows of 4x4
    with pytest.raises(ValueError, match="no multiple of the patch"):
        free(torch.randn(1, 3, 100, 128))


@pytest.mark.parametrize("img_size", [64, 80])  # 80: 5x5 tokens, so windows of 4x4 are padded
def test_vit_learns_a_small_batch_with_every_parameter(img_size):
    torch.manual_seed(0)
    net = SimpleViT(img_size, num_classes=4, embed_dim=64, num_heads=2)
    x, y = torch.randn(16, 3, img_size, img_size), torch.arange(16) % 4
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        assert all(p.grad is not None and p.grad.any() for p in net.parameters())
        optimizer.step()
    assert F.cross_entropy(net.eval()(x), y) < 0.1


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 2) + 1
    out = drop_path(x, 0.3, training=True)
    kept = out[:, 0, 0] != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(out[kept], x[kept] / 0.7)
    assert not out[~kept].any()
    torch.testing.assert_close(
        drop_path(x, 0.3, True, scale_by_keep=False)[kept].max(), x.max(), atol=0.01, rtol=0
    )
    assert drop_path(x, 0.3) is x
    assert not drop_path(x, 1.0, training=True).any()
    layer = DropPath(0.3)
    assert layer.eval()(x) is x
    assert (layer.train()(x) == 0).any()


def test_patch_embedding_is_one_linear_map_per_patch():
    layer = PatchEmbed((4, 4), (4, 4), (0, 0), in_chans=3, embed_dim=5)
    x = torch.randn(2, 3, 8, 12)
    patches = F.unfold(x, 4, stride=4).transpose(1, 2)  # (B, 6, 48)
    expected = patches @ layer.proj.weight.flatten(1).T + layer.proj.bias
    torch.testing.assert_close(layer(x), expected.view(2, 2, 3, 5))


def test_mlp_takes_its_arguments_by_position_and_by_name():
    mlp = MLP(6, 12, 5, nn.ReLU, 0.0)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(mlp(x), mlp.fc2(mlp.fc1(x).relu()))
    assert mlp(x).shape == (2, 3, 5)
    assert MLP(in_features=6, act_layer=nn.GELU)(x).shape == (2, 3, 6)


def test_trunc_normal_stays_within_its_bounds():
    weights = trunc_normal_(torch.empty(10000), std=2.0, a=-1.0, b=1.0)
    assert weights.abs().max() <= 1


def test_transforms_are_the_contracts_sequences():
    transforms = pytest.importorskip("custom_transforms", reason="needs OpenCV")
    train, val = student_code.get_train_transforms(), student_code.get_val_transforms()
    names = [type(step).__name__ for step in train.transforms]
    assert names == [
        "Scale",
        "RandomHorizontalFlip",
        "RandomColor",
        "RandomRotate",
        "RandomSizedCrop",
        "ToTensor",
        "Normalize",
    ]
    names = [type(step).__name__ for step in val.transforms]
    assert names == ["Scale", "CenterCrop", "ToTensor", "Normalize"]
    grey = torch.full((200, 160, 3), 128, dtype=torch.uint8).numpy()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((128 / 255 - mean) / std).view(3, 1, 1).expand(3, 128, 128)
    torch.testing.assert_close(val(grey), expected, atol=1e-4, rtol=0)
    assert train(grey).shape == (3, 128, 128)
    assert isinstance(train, transforms.Compose)
