"""Pre-activation residual networks for images in [0, 1]: narrow, PreAct ResNet-18, WRN-d-k.

He et al., 2016, "Identity Mappings in Deep Residual Networks" (figure 4e); Zagoruyko & Komodakis,
2016, "Wide Residual Networks". Needs torch only.
"""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

NARROW = "wrn-16-1"  # 0.17 M parameters: robust training takes minutes on two CPU cores
ARCHS = ("narrow", "preact18", "wrn-28-10", "wrn-34-10")


def conv3x3(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """A padded 3x3 convolution without bias."""
    return nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)


class PreActBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))), with a projection shortcut where the shape changes.

    The projection is a 1x1 convolution of the first convolution's input. Its name is that of the
    public robust checkpoints.
    """

    def __init__(self, in_planes: int, planes: int, stride: int, shortcut: str = "convShortcut"):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.shortcut_name = shortcut
        if in_planes != planes or stride != 1:
            projection = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)
            setattr(self, shortcut, projection)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_planes, H, W) to (N, planes, H / stride, W / stride)."""
        h = F.relu(self.bn1(x))
        projection = getattr(self, self.shortcut_name, None)
        shortcut = x if projection is None else projection(h)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(h))))


class Group(nn.Module):
    """A stack of blocks of one width; the first may halve the resolution."""

    def __init__(self, blocks: int, in_planes: int, planes: int, stride: int):
        super().__init__()
        first = PreActBlock(in_planes, planes, stride)
        rest = (PreActBlock(planes, planes, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_planes, H, W) to (N, planes, H / stride, W / stride)."""
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-width: (N, 3, H, W) to logits (N, num_classes); depth = 6 n + 4.

    Its parameters have the names of the checkpoint `cifar10_rst_adv.pt.ckpt` (depth 28, width 10)
    of Carmon et al., 2019.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"wrn-{depth}-{width}: the depth is 10, 16, 22, 28, ...")
        n = (depth - 4) // 6
        planes = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = conv3x3(3, planes[0])
        self.block1 = Group(n, planes[0], planes[1], stride=1)
        self.block2 = Group(n, planes[1], planes[2], stride=2)
        self.block3 = Group(n, planes[2], planes[3], stride=2)
        self.bn1 = nn.BatchNorm2d(planes[3])
        self.fc = nn.Linear(planes[3], num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W) in [0, 1]."""
        h = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(h)).mean((2, 3)))


class PreActResNet18(nn.Module):
    """PreAct ResNet-18 with a 3x3 stem: (N, 3, H, W) to logits (N, num_classes)."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1 = conv3x3(3, 64)
        in_planes = 64
        for i, planes in enumerate((64, 128, 256, 512), 1):
            first = PreActBlock(in_planes, planes, 1 if i == 1 else 2, "shortcut")
            setattr(self, f"layer{i}", nn.Sequential(first, PreActBlock(planes, planes, 1)))
            in_planes = planes
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W) in [0, 1]."""
        h = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.relu(self.bn(h)).mean((2, 3)))


def init_weights(net: nn.Module) -> None:
    """Kaiming-normal convolutions (He et al., 2015), zero biases of the linear layers."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def build(arch: str, num_classes: int) -> nn.Module:
    """The network called narrow, preact18 or wrn-<depth>-<width>.

    Raises:
        ValueError: the name is none of these, or the depth is not 6 n + 4.
    """
    if arch == "preact18":
        return PreActResNet18(num_classes)
    found = re.fullmatch(r"wrn-(\d{1,3})-(\d{1,2})", NARROW if arch == "narrow" else arch)
    if not found:
        raise ValueError(f"unknown network {arch!r}: {', '.join(ARCHS)} or wrn-DEPTH-WIDTH")
    return WideResNet(int(found[1]), int(found[2]), num_classes)
