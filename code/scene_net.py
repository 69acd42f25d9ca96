"""SceneNet: our own network for scenes of 128 x 128 pixels, trained from scratch. Torch alone.

A residual network (He et al., 2016) that does most of its work on maps of 8 x 8, where a kernel of
3 x 3 sees a third of the scene's side. Each block ends with squeeze-and-excitation and, in
training, is skipped at random. writeup/README.md tells what was measured of each of these.
"""

from __future__ import annotations

from torch import Tensor, nn

from custom_blocks import DropPath


class SceneNet(nn.Module):
    """`(N, 3, H, W)` -> logits `(N, num_classes)`; made for H = W = 128.

    width: channels of the first stage; each later one halves the map and doubles the channels.
    depths: blocks of each stage.
    drop_path: how often the last block is skipped in training; earlier ones less, in proportion.
    """

    def __init__(
        self,
        num_classes: int = 100,
        width: int = 48,
        depths: tuple[int, ...] = (1, 2, 6, 2),
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *convolution(3, width // 2, stride=2),  # 128 -> 64
            nn.ReLU(inplace=True),
            *convolution(width // 2, width, stride=2),  # 64 -> 32
            nn.ReLU(inplace=True),
        )
        blocks, channels = [], width
        for stage, depth in enumerate(depths):  # maps of 32, 16, 8, 4
            for i in range(depth):
                stride = 2 if stage and not i else 1
                rate = drop_path * (len(blocks) + 1) / sum(depths)
                blocks.append(Block(channels, width * 2**stage, stride, rate))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))  # (N, C, H / 32, W / 32)
        return self.fc(self.avgpool(x).flatten(1))


class Block(nn.Module):
    """relu(shortcut(x) + branch(x)): two 3 x 3 convolutions, their channels weighed.

    Where the map is halved, the shortcut takes means of 2 x 2 pixels before its 1 x 1 convolution,
    which would drop three of four otherwise (ResNet-D: He et al., 2019, section 4.2).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            pool = nn.AvgPool2d(stride, ceil_mode=True)
            self.shortcut = nn.Sequential(pool, *convolution(inputs, outputs, kernel=1))
        self.branch = nn.Sequential(
            *convolution(inputs, outputs, stride=stride),
            nn.ReLU(inplace=True),
            *convolution(outputs, outputs),
        )
        self.excitation = SqueezeExcitation(outputs)
        self.drop_path = DropPath(drop_path)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.shortcut(x) + self.drop_path(self.excitation(self.branch(x))))


class SqueezeExcitation(nn.Module):
    """Each channel times a number in (0, 1) that the means of all channels decide.

    Hu et al., 2018, "Squeeze-and-Excitation Networks", eq. 2 to 4.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3))  # (N, C)
        s = self.excite(self.squeeze(z).relu()).sigmoid()
        return x * s[:, :, None, None]


def convolution(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution that keeps the map's size (over the stride), and its normalisation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


def initialise(net: SceneNet) -> None:
    """Kaiming's normal for convolutions; each branch starts at zero, as if its block were not
    there (Goyal et al., 2017, section 5.1)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, Block):
            nn.init.zeros_(module.branch[-1].weight)
