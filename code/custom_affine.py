"""Affine maps of the image plane: rotate, compose, resample once.

Coordinates are continuous: pixel i covers [i, i + 1]. An `Affine` (a, b, c, d, e, f) takes a point
(x, y) of the output to the point (a x + b y + c, d x + e y + f) of the input that it shows.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

Affine = tuple[float, float, float, float, float, float]


def inscribed_size(width: int, height: int, angle: float) -> tuple[int, int]:
    """The largest upright rectangle (width, height) inside a width x height one rotated by `angle`.

    angle: in radians. Two cases:
    1. Its four corners lie on four sides: width and height solve two linear equations.
    2. A long thin image: two corners touch the midpoints of the long sides, which limits both.
    """
    sin, cos = abs(math.sin(angle)), abs(math.cos(angle))
    short, long = min(width, height), max(width, height)
    if short > 2 * sin * cos * long:
        det = cos * cos - sin * sin
        w, h = (width * cos - height * sin) / det, (height * cos - width * sin) / det
    else:
        w, h = short / (2 * sin), short / (2 * cos)
        if width < height:
            w, h = h, w
    return max(1, int(w + 1e-6)), max(1, int(h + 1e-6))


def rotation(size: tuple[int, int], inner: tuple[int, int], angle: float) -> Affine:
    """Rotation by `angle` about the center of an image of `size`, cropped to a central `inner`."""
    sin, cos = math.sin(angle), math.cos(angle)
    x, y = inner[0] / 2, inner[1] / 2
    return (
        cos,
        -sin,
        size[0] / 2 - cos * x + sin * y,
        sin,
        cos,
        size[1] / 2 - sin * x - cos * y,
    )


def compose(first: Affine, then: Affine) -> Affine:
    """The product of two affine maps: `first` applied to the result of `then`."""
    a, b, c, d, e, f = first
    g, h, i, j, k, m = then
    return (
        a * g + b * j,
        a * h + b * k,
        a * i + b * m + c,
        d * g + e * j,
        d * h + e * k,
        d * i + e * m + f,
    )


def warp_image(
    img: np.ndarray, warp: Affine, size: tuple[int, int], out: np.ndarray | None = None
) -> np.ndarray:
    """Resample `img` (H, W, C) bilinearly to `size` = (width, height); edges are replicated."""
    a, b, c, d, e, f = warp
    # OpenCV's origin is the center of the first pixel, not its corner
    matrix = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(img, matrix, size, out, flags, cv2.BORDER_REPLICATE)
