"""Affine maps of the image plane: rotate, compose, resample once.

Coordinates are continuous: pixel i covers [i, i + 1]. An `Affine` (a, b, c, d, e, f) takes a point
(x, y) of the output to the point (a x + b y + c, d x + e y + f) of the input that it shows. Each of
its elements is a number, or an array (n,) for n images.
"""

from __future__ import annotations

import cv2
import numpy as np

Numbers = float | np.ndarray  # of one image, or (n,)
Affine = tuple[Numbers, Numbers, Numbers, Numbers, Numbers, Numbers]


def inscribed_size(width: Numbers, height: Numbers, angle: Numbers) -> tuple[np.ndarray, ...]:
    """The largest upright rectangle (width, height) inside a width x height one rotated by `angle`.

    angle: in radians. Two cases:
    1. Its four corners lie on four sides: width and height solve two linear equations.
    2. A long thin image: two corners touch the midpoints of the long sides, which limits both.
    """
    sin, cos = np.abs(np.sin(angle)), np.abs(np.cos(angle))
    short, long = np.minimum(width, height), np.maximum(width, height)
    with np.errstate(divide="ignore", invalid="ignore"):  # in the case that does not apply
        det = cos * cos - sin * sin
        four = (width * cos - height * sin) / det, (height * cos - width * sin) / det
        along, across = short / (2 * sin), short / (2 * cos)
    wide = width >= height
    two = np.where(wide, along, across), np.where(wide, across, along)
    w, h = (np.where(short > 2 * sin * cos * long, *v) for v in zip(four, two, strict=True))
    return tuple(np.maximum(1, np.floor(v + 1e-6)).astype(int) for v in (w, h))


def rotation(
    size: tuple[Numbers, Numbers], inner: tuple[Numbers, Numbers], angle: Numbers
) -> Affine:
    """Rotation by `angle` about the center of an image of `size`, cropped to a central `inner`."""
    sin, cos = np.sin(angle), np.cos(angle)
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
