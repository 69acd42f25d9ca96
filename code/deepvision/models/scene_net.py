"""SceneNet: our own network for scenes of 128 x 128 pixels, trained from scratch. Needs torch only.

Residual blocks (He et al., 2016) on maps of 32 x 32, 16 x 16 and 8 x 8, with max pooling in
between: no convolution there has a stride. A `Shape` says how many blocks, how wide, whether a
pooled map is blurred and whether blocks end with squeeze-and-excitation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from torch import Tensor, nn

from custom_blocks import DropPath

MOST_CHANNELS, MOST_BLOCKS = 4096, 32  # of a shape that a file records


@dataclass(frozen=True)
class Shape:
    """The shape of a SceneNet, saved with it. The defaults are those of files that record none.

    stem: channels of the 3 x 3 convolutions before the first pooling; the first has stride 2.
    widths, depths: channels and blocks of each stage; pooling before each stage halves the map.
    features: channels of the last, 1 x 1 convolution, of which the means over the map are taken.
    blur: pool in two steps, a maximum with stride 1 and a mean with stride 2, which aliases less
        (Zhang, 2019, "Making Convolutional Networks Shift-Invariant Again", section 3.2).
    se: the reduction of squeeze-and-excitation; 0 = none.
    drop_path: how often the last block is skipped in training; earlier ones less, in proportion.
    """

    stem: tuple[int, ...] = (64,)
    widths: tuple[int, ...] = (64, 128, 256)
    depths: tuple[int, ...] = (1, 3, 4)
    features: int = 1024
    blur: bool = False
    se: int = 8
    drop_path: float = 0.1

    @classmethod
    def load(cls, saved: dict) -> Shape:
        """The shape in a checkpoint or config.json.

        Raises:
            ValueError, TypeError: a value is missing, of another type or out of range.
        """
        lists = {k: tuple(map(int, saved[k])) for k in ("stem", "widths", "depths")}
        shape = replace(cls(**saved), **lists)
        channels = (*shape.stem, *shape.widths, shape.features)
        if not (
            shape.stem
            and 0 < len(shape.widths) == len(shape.depths)
            and all(0 < n <= MOST_CHANNELS for n in channels)
            and all(n > 0 for n in shape.depths)
            and sum(shape.depths) <= MOST_BLOCKS
            and 0 <= shape.se <= min(shape.widths)
            and 0 <= shape.drop_path < 1
        ):
            raise ValueError(f"no SceneNet has the shape {saved}")
        return shape

    def save(self) -> dict:
        """The shape as plain values, for checkpoints and config.json."""
        return asdict(self)


# By --recipe: one for a GPU, one for two cores of a CPU
SHAPES = {
    "gpu": Shape((32, 64), (96, 192, 384), (2, 4, 3), blur=True, se=16, drop_path=0.0),
    # On a CPU, blurred pooling (a maximum of stride 1 writes an index of 8 bytes per value) and a
    # stem of 64 channels took 40 % of a step
    "cpu": Shape((32,), depths=(1, 2, 3), se=0, drop_path=0.0),
}


class SceneNet(nn.Module):
    """`(N, 3, H, W)` -> logits `(N, num_classes)`; made for H = W = 128."""

    def __init__(self, num_classes: int = 100, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or Shape()
        layers, channels, blocks = [], 3, 0
        for width in shape.stem:
            stride = 1 if layers else 2  # 128 -> 64
            layers += [*conv_bn(channels, width, stride=stride), nn.ReLU(inplace=True)]
            channels = width
        for width, depth in zip(shape.widths, shape.depths, strict=True):  # maps of 32, 16, 8
            layers.append(pooling(shape.blur))
            for _ in range(depth):
                blocks += 1
                drop_path = shape.drop_path * blocks / sum(shape.depths)
                layers.append(Block(channels, width, shape.se, drop_path))
                channels = width
        layers += [*conv_bn(channels, shape.features, kernel=1), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(shape.features, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of normalised images (N, 3, H, W)."""
        x = self.features(x)  # (N, C, H / 16, W / 16)
        return self.fc(self.avgpool(x).flatten(1))


def pooling(blur: bool) -> nn.Module:
    """Max pooling of 3 x 3 that halves the map; see `Shape.blur`."""
    if not blur:
        return nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    return nn.Sequential(nn.MaxPool2d(kernel_size=3, stride=1, padding=1), nn.AvgPool2d(2))


class Block(nn.Module):
    """relu(shortcut(x) + branch(x)): two 3 x 3 convolutions, then a gate on the channels."""

    def __init__(self, inputs: int, outputs: int, se: int, drop_path: float) -> None:
        super().__init__()
        self.shortcut = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(*conv_bn(inputs, outputs, kernel=1))
        self.branch = nn.Sequential(
            *conv_bn(inputs, outputs),
            nn.ReLU(inplace=True),
            *conv_bn(outputs, outputs),
        )
        self.excitation = SqueezeExcitation(outputs, se) if se else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W)."""
        return self.relu(self.shortcut(x) + self.drop_path(self.excitation(self.branch(x))))


class SqueezeExcitation(nn.Module):
    """Multiplies each channel by a gate in (0, 1), computed from the means of all channels.

    Hu et al., 2018, "Squeeze-and-Excitation Networks", eq. 2 to 4.
    """

    def __init__(self, channels: int, reduction: int) -> None:
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
