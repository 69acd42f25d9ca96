"""SceneNet: our own network for scenes of 128 x 128 pixels, trained from scratch. Needs torch only.

Residual blocks (He et al., 2016) on maps of 32 x 32, 16 x 16 and 8 x 8, with max pooling in
between: no convolution there has a stride. Each block ends with squeeze-and-excitation and, in
training, is skipped at random. writeup/README.md reports the gain of each of these.
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
        width: int = 64,
        depths: tuple[int, ...] = (1, 3, 4),
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        layers = [*conv_bn(3, width, stride=2), nn.ReLU(inplace=True)]  # 128 -> 64
        channels, blocks = width, 0
        for stage, depth in enumerate(depths):  # maps of 32, 16, 8
            layers.append(nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
            for _ in range(depth):
                blocks += 1
                layers.append(Block(channels, width * 2**stage, drop_path * blocks / sum(depths)))
                channels = width * 2**stage
        # many features, of which the means over the map are taken
        layers += [*conv_bn(channels, 4 * channels, kernel=1), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * channels, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of normalised images (N, 3, H, W)."""
        x = self.features(x)  # (N, C, H / 16, W / 16)
        return self.fc(self.avgpool(x).flatten(1))


class Block(nn.Module):
    """relu(shortcut(x) + branch(x)): two 3 x 3 convolutions, then a gate on the channels."""

    def __init__(self, inputs: int, outputs: int, drop_path: float) -> None:
        super().__init__()
        self.shortcut = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(*conv_bn(inputs, outputs, kernel=1))
        self.branch = nn.Sequential(
            *conv_bn(inputs, outputs),
            nn.ReLU(inplace=True),
            *conv_bn(outputs, outputs),
        )
        self.excitation = SqueezeExcitation(outputs)
        self.drop_path = DropPath(drop_path)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W)."""
        return self.relu(self.shortcut(x) + self.drop_path(self.excitation(self.branch(x))))


class SqueezeExcitation(nn.Module):
    """Multiplies each channel by a gate in (0, 1), computed from the means of all channels.

    Hu et al., 2018, "Squeeze-and-Excitation Networks", eq. 2 to 4.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        z = x.mean((2, 3))  # (N, C)
        s = self.excite(self.squeeze(z).relu()).sigmoid()
        return x * s[:, :, None, None]


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution that keeps the map's size (over the stride), and its normalisation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


def init_weights(net: SceneNet) -> None:
    """Kaiming normal initialisation of convolutions; each residual branch starts at zero.

    Goyal et al., 2017, section 5.1.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, Block):
            nn.init.zeros_(module.branch[-1].weight)
