"""Augmentation on the device: workers draw the parameters, the device transforms whole batches.

The images lie on the device as uint8. For each sample a worker draws what the course's transforms
would draw; one bilinear warp, one gain per channel and the normalisation make a batch of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from custom_affine import Affine, compose
from custom_transforms import FUSED, Compose, sample_warps
from utils import UserError


class AugmentParams:
    """Makes, in place of the course's transforms, the parameters of what they would do.

    shape: (H, W, 3) of the images.
    A sample has the `shape` (12,): the index of the image, the affine warp (a, b, c, d, e, f) from
    output to image, a gain per channel, the output's width and height.

    Raises:
        UserError: other transforms than the course's, or ones that a bilinear warp cannot replace.
    """

    shape = (12,)
    dtype = torch.float32

    def __init__(self, transforms: Compose | None, shape: tuple[int, ...]) -> None:
        self.steps = getattr(transforms, "transforms", [])
        self.source = shape[1], shape[0]  # width, height
        if tuple(map(type, self.steps)) not in FUSED:
            raise UserError("--cache=device supports the course's transforms only: use --cache=ram")
        scale = self.steps[0]
        self.scaled = width, height = scale.target(*self.source)
        reduced = self.source[0] > 2 * width or self.source[1] > 2 * height
        if reduced or scale.interpolation != cv2.INTER_LINEAR:
            raise UserError(
                "--cache=device scales bilinearly and at most to half the size: use --cache=ram"
            )
        self.draws, self.crop, self.normalize = transforms.draws, self.steps[-3], self.steps[-1]

    def write(self, indices: Iterable[int], out: np.ndarray, u: np.ndarray) -> None:
        """Write the parameters of n images to `out` (n, 12). u: uniform numbers (n, draws)."""
        out[:, 0], out[:, 10:] = list(indices), self.crop.size
        if self.draws:
            out[:, 1:7], out[:, 7:10] = sample_warps(u, self.source, self.scaled, *self.steps[1:-2])
        else:
            out[:, 1:7], out[:, 7:10] = self._center_crop(), 1

    def _center_crop(self) -> Affine:
        (width, height), (w, h) = self.scaled, self.crop.size
        scale = (self.source[0] / width, 0, 0, 0, self.source[1] / height, 0)
        return compose(scale, (1, 0, (width - w) // 2, 0, 1, (height - h) // 2))


class DeviceImages(AugmentParams):
    """Images (N, H, W, 3), uint8 on a device, and the transforms that make batches of them there.

    Raises:
        UserError: as `AugmentParams`.
    """

    def __init__(self, images: Tensor, transforms: Compose | None) -> None:
        super().__init__(transforms, images.shape[1:])
        self.images = images
        self.size = torch.tensor(self.source, device=images.device)
        self.mean, self.std = (
            torch.tensor(v, device=images.device)[:, None, None]
            for v in (self.normalize.mean, self.normalize.std)
        )

    def read(self, index: int) -> int:
        """The index: the image itself stays on the device."""
        return index

    def finish(self, params: Tensor, _: torch.device) -> Tensor:
        """(B, 12) -> normalised images (B, 3, h, w) where all images are, whatever the loader's
        device; rounds to grey levels where the CPU does."""
        device, (width, height) = self.images.device, params[0, 10:].int().tolist()
        params = params.to(device, non_blocking=True)
        warps, gains = params[:, 1:7].view(-1, 1, 1, 2, 3), params[:, 7:10, None, None]
        out_x = torch.arange(width, device=device)[:, None] + 0.5  # (w, 1)
        out_y = torch.arange(height, device=device)[:, None, None] + 0.5  # (h, 1, 1)
        x = self.images[params[:, 0].long()].permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        # sums, not a matrix product: TF32 would lose a tenth of a pixel
        seen_at = warps[..., 0] * out_x + warps[..., 1] * out_y + warps[..., 2]  # (B, h, w, 2)
        grid = 2 * seen_at / self.size - 1
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False).round_()
        x = x.mul_(gains).add_(0.5).clamp_(max=255).floor_()
        return (x / 255 - self.mean) / self.std

    def __getstate__(self) -> dict:
        """Nothing on the device travels to workers, which call `read` and `write` only."""
        return {k: v for k, v in vars(self).items() if not isinstance(v, Tensor)}
