"""Random views of images, drawn independently, differentiable with respect to the pixels.

The augmentations of SimCLR (Chen et al., 2020, appendix A): resized crop, horizontal flip, colour
jitter, greyscale. Needs torch only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from deepvision.attacks.norms import on_device

MIN_CROP = 0.2  # smallest area of a crop, as a fraction of the image; SimCLR's is 0.08
RATIO = (3 / 4, 4 / 3)  # width / height of a crop
JITTER = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue
P_JITTER, P_GREY, P_FLIP = 0.8, 0.2, 0.5

LUMA = (0.299, 0.587, 0.114)
YIQ = (LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
FROM_YIQ = tuple(map(tuple, torch.tensor(YIQ, dtype=torch.float64).inverse().tolist()))


def views(
    x: Tensor, n: int, generator: torch.Generator | None = None, min_crop: float = MIN_CROP
) -> Tensor:
    """`n` views of each image (N, 3, H, W) in [0, 1]: (N, n, 3, H, W)."""
    flat = x.repeat_interleave(n, dim=0)
    flat = jitter_colour(crop(flat, generator, min_crop), generator)
    return flat.clamp(0, 1).unflatten(0, (len(x), n))


def uniform(n: int, low: float, high: float, like: Tensor, generator) -> Tensor:
    """(n,) uniform numbers, drawn on the generator's device: a seed means the same anywhere."""
    device = like.device if generator is None else generator.device
    drawn = torch.rand(n, generator=generator, device=device)
    return low + (high - low) * drawn.to(like, non_blocking=like.is_cuda)


def crop(x: Tensor, generator: torch.Generator | None, min_crop: float = MIN_CROP) -> Tensor:
    """A random crop of each image (N, 3, H, W), resized to H x W; half of them flipped.

    min_crop: the smallest area of a crop, as a fraction of the image.
    """
    N = len(x)
    area = uniform(N, min_crop, 1.0, x, generator)
    ratio = uniform(N, math.log(RATIO[0]), math.log(RATIO[1]), x, generator).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = x.new_zeros(N, 2, 3)  # from coordinates of the view to those of the image, in [-1, 1]
    flipped = uniform(N, 0, 1, x, generator) < P_FLIP
    theta[:, 0, 0] = torch.where(flipped, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = uniform(N, -1, 1, x, generator) * (1 - width)
    theta[:, 1, 2] = uniform(N, -1, 1, x, generator) * (1 - height)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def jitter_colour(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Brightness, contrast, saturation and hue in this order, as one matrix per image.

    x: (N, 3, H, W). Brightness and contrast scale the colours, saturation interpolates between a
    colour and its grey, hue rotates around the grey axis (in YIQ). Only contrast adds an offset:
    it preserves the image's mean grey.
    """
    N = len(x)
    jittered = uniform(N, 0, 1, x, generator) < P_JITTER
    b, c, s = (
        torch.where(jittered, uniform(N, 1 - j, 1 + j, x, generator), 1.0) for j in JITTER[:3]
    )
    turn = torch.where(jittered, uniform(N, -JITTER[3], JITTER[3], x, generator), 0.0)
    s = torch.where(uniform(N, 0, 1, x, generator) < P_GREY, 0.0, s)
    luma = on_device(LUMA, x.dtype, x.device)
    s = s.view(N, 1, 1)
    saturation = s * torch.eye(3, device=x.device) + (1 - s) * luma.expand(3, 3)
    matrix = (b * c).view(N, 1, 1) * (hue_rotation(turn) @ saturation)  # (N, 3, 3)
    mean_grey = (x.mean((2, 3)) @ luma) * b  # (N,)
    offset = ((1 - c) * mean_grey).view(N, 1, 1, 1)
    return torch.einsum("nij,njhw->nihw", matrix, x) + offset


def hue_rotation(turn: Tensor) -> Tensor:
    """Turns of the colour circle (N,) to matrices (N, 3, 3) on RGB."""
    to_yiq, from_yiq = (on_device(m, turn.dtype, turn.device) for m in (YIQ, FROM_YIQ))
    cos, sin = (2 * math.pi * turn).cos(), (2 * math.pi * turn).sin()
    rotation = torch.eye(3, dtype=turn.dtype, device=turn.device).repeat(len(turn), 1, 1)
    rotation[:, 1, 1], rotation[:, 1, 2] = cos, -sin
    rotation[:, 2, 1], rotation[:, 2, 2] = sin, cos
    return from_yiq @ rotation @ to_yiq
