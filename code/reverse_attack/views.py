"""Random views of images, each drawn by itself, differentiable with respect to the pixels.

The augmentations of SimCLR (Chen et al., 2020, appendix A): resized crop, mirror, colour jitter,
grey. Torch alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # of a crop: its share of the area, width by height
JITTER = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue
P_JITTER, P_GREY, P_FLIP = 0.8, 0.2, 0.5

LUMA = (0.299, 0.587, 0.114)
YIQ = (LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def views(x: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """`n` views of each of the pixels `(N, 3, H, W)` in [0, 1]: `(N, n, 3, H, W)`."""
    flat = x.repeat_interleave(n, dim=0)
    flat = recolour(crop(flat, generator), generator)
    return flat.clamp(0, 1).unflatten(0, (len(x), n))


def uniform(n: int, low: float, high: float, like: Tensor, generator) -> Tensor:
    """`(n,)`, drawn on the generator's device, so that a seed means the same anywhere."""
    device = like.device if generator is None else generator.device
    return low + (high - low) * torch.rand(n, generator=generator, device=device).to(like)


def crop(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random part of each image, stretched to its size; half of them mirrored."""
    N = len(x)
    area = uniform(N, *SCALE, x, generator)
    ratio = uniform(N, math.log(RATIO[0]), math.log(RATIO[1]), x, generator).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = x.new_zeros(N, 2, 3)  # from places in the view to places in the image, both in [-1, 1]
    mirrored = uniform(N, 0, 1, x, generator) < P_FLIP
    theta[:, 0, 0] = torch.where(mirrored, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = uniform(N, -1, 1, x, generator) * (1 - width)
    theta[:, 1, 2] = uniform(N, -1, 1, x, generator) * (1 - height)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def recolour(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Brightness, contrast, saturation and hue in this order, as one matrix for each image.

    Brightness and contrast scale the colours, saturation moves them from their grey, hue turns them
    around the grey axis (in YIQ); only contrast adds something: it keeps the image's mean grey.
    """
    N = len(x)
    jittered = uniform(N, 0, 1, x, generator) < P_JITTER
    b, c, s = (
        torch.where(jittered, uniform(N, 1 - j, 1 + j, x, generator), 1.0) for j in JITTER[:3]
    )
    turn = torch.where(jittered, uniform(N, -JITTER[3], JITTER[3], x, generator), 0.0)
    s = torch.where(uniform(N, 0, 1, x, generator) < P_GREY, 0.0, s)
    luma = x.new_tensor(LUMA)
    s = s.view(N, 1, 1)
    saturation = s * torch.eye(3, device=x.device) + (1 - s) * luma.expand(3, 3)
    matrix = (b * c).view(N, 1, 1) * (hue_rotation(turn) @ saturation)  # (N, 3, 3)
    mean_grey = (x.mean((2, 3)) @ luma) * b  # (N,)
    offset = ((1 - c) * mean_grey).view(N, 1, 1, 1)
    return torch.einsum("nij,njhw->nihw", matrix, x) + offset


def hue_rotation(turn: Tensor) -> Tensor:
    """`(N,)` turns of the colour circle to matrices `(N, 3, 3)` on RGB."""
    to_yiq = turn.new_tensor(YIQ)
    cos, sin = (2 * math.pi * turn).cos(), (2 * math.pi * turn).sin()
    rotation = torch.eye(3).to(turn).repeat(len(turn), 1, 1)
    rotation[:, 1, 1], rotation[:, 1, 2] = cos, -sin
    rotation[:, 2, 1], rotation[:, 2, 2] = sin, cos
    return torch.linalg.inv(to_yiq) @ rotation @ to_yiq
