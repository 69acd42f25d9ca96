"""Pictures with captions: what the network saw, what it answered, what an attack changed."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from custom_transforms import IMAGENET_MEAN, IMAGENET_STD

TILE = 256  # pixels that an image is shown at
LINE = 22  # pixels of one line of a caption
RED = np.array([255, 0, 0], np.float32)


def pixels(x: Tensor) -> np.ndarray:
    """Normalised images (N, 3, H, W) as uint8 (N, H, W, 3)."""
    mean, std = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    values = (x.detach() * std + mean).clamp(0, 1) * 255
    return values.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def difference(x: Tensor, x_adv: Tensor, factor: float) -> Tensor:
    """x_adv - x, amplified around mid-grey, as a normalised batch (N, 3, H, W)."""
    mean, std = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    shown = 0.5 + factor * (x_adv - x) * std  # in pixels of [0, 1]
    return (shown.clamp(0, 1) - mean) / std


def overlay(images: np.ndarray, maps: Tensor) -> np.ndarray:
    """Images (N, H, W, 3), greyed, with maps (N, H, W) in [0, 1] over them in red."""
    weight = maps.cpu().numpy()[..., None] ** 0.5  # most of a gradient is far below its peak
    grey = images.mean(3, keepdims=True) / 2 + 64.0
    return ((1 - weight) * grey + weight * RED).astype(np.uint8)


def format_predictions(logits: Tensor, categories: Sequence[str]) -> list[str]:
    """'castle 63 %' for each row of logits (N, K)."""
    confidence, label = logits.float().softmax(1).max(1)
    return [
        f"{categories[k]} {100 * p:.0f} %"
        for p, k in zip(confidence.tolist(), label.tolist(), strict=True)
    ]


def tile(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """An image (H, W, 3), enlarged, above a caption of one or more lines: (H', W', 3)."""
    shown = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_NEAREST)
    band = np.zeros((LINE * len(lines) + 8, TILE, 3), np.uint8)
    for i, line in enumerate(lines, start=1):
        text = line.encode("ascii", "replace").decode()  # all that OpenCV's letters can draw
        scale = min(0.5, 0.5 * (TILE - 8) / max(1, _width(text)))
        place = (4, LINE * i - 4)
        cv2.putText(
            band, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA
        )
    return np.concatenate([shown, band])


def _width(text: str) -> int:
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)[0][0]


def grid(tiles: Sequence[np.ndarray], columns: int) -> Tensor:
    """Tiles of one size side by side, row by row, as a picture (3, H, W) in [0, 1]."""
    blank = np.zeros_like(tiles[0])
    tiles = [*tiles, *[blank] * (-len(tiles) % columns)]
    rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
    return torch.from_numpy(np.concatenate(rows)).permute(2, 0, 1).float() / 255
