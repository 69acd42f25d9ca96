"""Pictures with captions: images, predictions, what an attack changed, saliency maps."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from custom_transforms import IMAGENET_MEAN, IMAGENET_STD

TILE = 256  # side of an image in a captioned tile, in pixels
FONT, SCALE, LINE = cv2.FONT_HERSHEY_SIMPLEX, 0.75, 30  # LINE: pixels per line of a caption
RED = np.array([255, 0, 0], np.float32)
MAX_WEIGHT = 0.65  # of the red over an image: the picture stays visible below it


def pixels(x: Tensor) -> np.ndarray:
    """Normalised images (N, 3, H, W) as uint8 (N, H, W, 3)."""
    mean, std = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    values = (x.detach() * std + mean).clamp(0, 1) * 255
    return values.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def normalised(images: np.ndarray) -> Tensor:
    """uint8 images (N, H, W, 3) as normalised float32 (N, 3, H, W): the inverse of `pixels`."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((x - mean) / std).contiguous()


def difference(x: Tensor, x_adv: Tensor, factor: float) -> Tensor:
    """x_adv - x, amplified around mid-grey, as a normalised batch (N, 3, H, W)."""
    mean, std = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    shown = 0.5 + factor * (x_adv - x) * std  # pixels in [0, 1]
    return (shown.clamp(0, 1) - mean) / std


def overlay(images: np.ndarray, maps: Tensor) -> np.ndarray:
    """Greyscale copies of images (N, H, W, 3) with maps (N, H, W) in [0, 1] over them in red.

    The weight of the red is MAX_WEIGHT · sqrt(map), because most of a gradient is far below its
    peak; so at least a third of each pixel is the picture.
    """
    weight = MAX_WEIGHT * maps.cpu().numpy()[..., None] ** 0.5
    grey = images.mean(3, keepdims=True)
    return ((1 - weight) * grey + weight * RED).round().astype(np.uint8)


def format_predictions(logits: Tensor, categories: Sequence[str]) -> list[str]:
    """'castle 63 %' for each row of logits (N, K)."""
    confidence, label = logits.float().softmax(1).max(1)
    return [
        f"{categories[k]} {100 * p:.0f} %"
        for p, k in zip(confidence.tolist(), label.tolist(), strict=True)
    ]


def tile(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """An image (H, W, 3), enlarged, above its caption (H', W', 3); long lines are wrapped."""
    shown = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_NEAREST)
    # OpenCV's letters are ASCII
    wrapped = [part for line in lines for part in wrap(line.encode("ascii", "replace").decode())]
    band = np.zeros((LINE * len(wrapped) + 8, TILE, 3), np.uint8)
    for i, text in enumerate(wrapped, start=1):
        scale = SCALE * min(1, (TILE - 8) / max(1, _width(text)))
        place = (4, LINE * i - 6)
        cv2.putText(band, text, place, FONT, scale, (255, 255, 255), 1, cv2.LINE_AA)
    return np.concatenate([shown, band])


def wrap(text: str) -> list[str]:
    """The text in lines that fit below a tile; a word that is too long stays alone on its line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _width(longer) > TILE - 8:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _width(text: str) -> int:
    return cv2.getTextSize(text, FONT, SCALE, 1)[0][0]


def grid(tiles: Sequence[np.ndarray], columns: int) -> Tensor:
    """Tiles (H, W, 3) of one width in rows of `columns`, as a picture (3, H', W') in [0, 1].

    The captions of a row may differ in length: black fills the space below the shorter ones.
    """
    rows = []
    for i in range(0, len(tiles), columns):
        row = [*tiles[i : i + columns]]
        row += [np.zeros_like(row[0])] * (columns - len(row))
        height = max(len(t) for t in row)
        rows.append(
            np.concatenate([np.pad(t, ((0, height - len(t)), (0, 0), (0, 0))) for t in row], 1)
        )
    return torch.from_numpy(np.concatenate(rows)).permute(2, 0, 1).float() / 255
