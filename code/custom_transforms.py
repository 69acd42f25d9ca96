"""Image augmentation: uint8 RGB arrays (H, W, 3) in, float tensors (C, H, W) out.

Every random class has a law: `sample` makes its values from uniform numbers in [0, 1), `draws` of
them for each image, with NumPy for many images at once. Called on one image, a class takes these
numbers from Python's `random`, so the seed determines the augmentation.

Run one after the other, the classes below resample an image three times and read it nine times.
`Compose` recognises the two sequences of the course: it takes the same numbers in the same order,
but resamples the image once (the fused path). Any other sequence, a subclass or a reordered list
included, runs step by step.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import islice

import cv2
import numpy as np
import torch

from custom_affine import Numbers, compose, inscribed_size, rotation, warp_image
from utils import resize_image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Size = tuple[Numbers, Numbers]  # width, height


class Scale:
    """Resize so that the shorter side is `size` (an int), or to `size` = (width, height).

    The interpolation is fixed, bilinear by default, so that an evaluation gives the same figure
    twice. Bilinear interpolation aliases on strong reductions; cv2.INTER_AREA does not.
    """

    def __init__(self, size: int | Sequence[int], interpolation: int = cv2.INTER_LINEAR) -> None:
        self.size = _positive(size) if isinstance(size, int) else _pair(size)
        self.interpolation = interpolation

    def target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the resized image."""
        if not isinstance(self.size, int):
            return self.size
        short = min(width, height)
        return (
            self.size if width == short else round(width * self.size / short),
            self.size if height == short else round(height * self.size / short),
        )

    def __call__(self, img: np.ndarray) -> np.ndarray:
        height, width = img.shape[:2]
        size = self.target(width, height)
        return img if size == (width, height) else resize_image(img, size, self.interpolation)

    def __repr__(self) -> str:
        return f"Scale({self.size})"


class CenterCrop:
    """Crop the center, `size` = (width, height), or a square for an int.

    Raises:
        ValueError: the image is smaller than the crop.
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = _pair(size)

    def __call__(self, img: np.ndarray) -> np.ndarray:
        width, height = self.size
        if img.shape[0] < height or img.shape[1] < width:
            raise ValueError(
                f"cannot crop {width}x{height} from an image of {img.shape[1]}x{img.shape[0]}"
            )
        y, x = (img.shape[0] - height) // 2, (img.shape[1] - width) // 2
        return img[y : y + height, x : x + width]

    def __repr__(self) -> str:
        return f"CenterCrop({self.size})"


class RandomSizedCrop:
    """Crop a rectangle of random area, aspect ratio and position; resize it to `size` (bilinear).

    The area is uniform in `area_range` (a fraction of the image), the aspect ratio (width / height)
    log-uniform in `ratio_range`, the position uniform. If `tries` rectangles in a row do not fit,
    the largest central square is used. Inception (Szegedy et al., 2015, sec. 6) starts at 8 % of
    the area; 128-pixel scenes lose their subject there, hence 25 %.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        area_range: tuple[float, float] = (0.25, 1.0),
        ratio_range: tuple[float, float] = (3 / 4, 4 / 3),
        tries: int = 10,
    ) -> None:
        self.size = _pair(size)
        self.area_range = _interval("area_range", area_range, upper=1.0)
        self.ratio_range = _interval("ratio_range", ratio_range)
        self.tries = tries

    @property
    def draws(self) -> int:
        """Uniform numbers per image."""
        return 2 + 2 * self.tries

    def sample(self, u: np.ndarray, width: Numbers, height: Numbers) -> tuple[np.ndarray, ...]:
        """The rectangles (x, y, width, height), each (n,), that u (draws, n) gives."""
        area = width * height * _between(*self.area_range, u[2 : 2 + self.tries])  # (tries, n)
        ratio = np.exp(_between(*map(math.log, self.ratio_range), u[2 + self.tries :]))
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first, any_fits = (fits.argmax(0), np.arange(fits.shape[1])), fits.any(0)
        side = np.minimum(width, height)
        w, h = (np.where(any_fits, v[first], side) for v in (w, h))
        x, y = (
            np.where(any_fits, np.floor(v * (space + 1)), space // 2)
            for v, space in zip(u[:2], (width - w, height - h), strict=True)
        )
        return x, y, w, h

    def __call__(self, img: np.ndarray) -> np.ndarray:
        box = self.sample(_from_random(self.draws), img.shape[1], img.shape[0])
        x, y, w, h = (int(v[0]) for v in box)
        return resize_image(img[y : y + h, x : x + w], self.size)

    def __repr__(self) -> str:
        return f"RandomSizedCrop({self.size}, area_range={self.area_range})"


class RandomHorizontalFlip:
    """Flip left and right with probability `p`."""

    draws = 1

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"a probability lies in [0, 1]; got {p}")
        self.p = p

    def sample(self, u: np.ndarray) -> np.ndarray:
        """Whether to flip (n,), from u (1, n)."""
        return u[0] < self.p

    def __call__(self, img: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(img[:, ::-1]) if self.sample(_from_random(1))[0] else img

    def __repr__(self) -> str:
        return f"RandomHorizontalFlip({self.p})"


class RandomColor:
    """Multiply each channel by a gain uniform in 1 ± `color_range`; clip to 0-255."""

    draws = 3

    def __init__(self, color_range: float) -> None:
        if not 0 <= color_range <= 1:
            raise ValueError(f"color_range lies in [0, 1]; got {color_range}")
        self.color_range = color_range

    def sample(self, u: np.ndarray) -> np.ndarray:
        """A gain per channel (3, n), from u (3, n)."""
        return _between(1 - self.color_range, 1 + self.color_range, u)

    def __call__(self, img: np.ndarray) -> np.ndarray:
        planes = zip(cv2.split(img), self.sample(_from_random(3))[:, 0], strict=True)
        return cv2.merge([cv2.convertScaleAbs(plane, alpha=gain) for plane, gain in planes])

    def __repr__(self) -> str:
        return f"RandomColor({self.color_range})"


class RandomRotate:
    """Rotate by an angle uniform in [-degree_range, degree_range] degrees, without black corners.

    The result is the largest upright rectangle inside the rotated image.
    """

    draws = 1

    def __init__(self, degree_range: float) -> None:
        if not 0 <= degree_range <= 180:
            raise ValueError(f"degree_range lies in [0, 180]; got {degree_range}")
        self.degree_range = degree_range

    def sample(self, u: np.ndarray) -> np.ndarray:
        """The angles (n,) in radians, counter-clockwise, from u (1, n)."""
        return np.radians(_between(-self.degree_range, self.degree_range, u[0]))

    def __call__(self, img: np.ndarray) -> np.ndarray:
        angle = float(self.sample(_from_random(1))[0])
        size = tuple(map(int, inscribed_size(img.shape[1], img.shape[0], angle)))
        return warp_image(img, rotation((img.shape[1], img.shape[0]), size, angle), size)

    def __repr__(self) -> str:
        return f"RandomRotate({self.degree_range})"


class ToTensor:
    """(H, W, C) array to float32 tensor (C, H, W); uint8 is divided by 255, floats are kept."""

    def __call__(self, img: np.ndarray) -> torch.Tensor:
        if img.ndim != 3:
            raise ValueError(f"ToTensor needs an (H, W, C) image; got the shape {img.shape}")
        tensor = torch.from_numpy(np.ascontiguousarray(img.transpose(2, 0, 1)))
        return tensor.float() / 255 if img.dtype == np.uint8 else tensor.float()

    def __repr__(self) -> str:
        return "ToTensor()"


class Normalize:
    """(x - mean) / std per channel, for (C, H, W) or (N, C, H, W)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(f"mean and std need one value per channel, std > 0; got {mean}, {std}")

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        mean, std = (tensor.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (tensor - mean) / std

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mean={self.mean}, std={self.std})"


class Denormalize(Normalize):
    """The inverse of `Normalize(mean, std)`: x * std + mean."""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        mean, std = (tensor.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return tensor * std + mean


class Compose:
    """Apply transforms in order; the two sequences of the course run fused.

    A data loader can call `write` for each image, in other processes, and `finish` once for a
    batch: bytes are a quarter of the floats to hand over.
    """

    dtype = torch.uint8  # of what `write` writes

    def __init__(self, transforms: Sequence[Callable]) -> None:
        self.transforms = list(transforms)

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(height, width, 3) of what a fused sequence writes; None for any other sequence."""
        if self._sequence() not in FUSED:
            return None
        width, height = self.transforms[-3].size
        return height, width, 3

    @property
    def draws(self) -> int:
        """Uniform numbers that a fused sequence takes for each image."""
        return sum(getattr(transform, "draws", 0) for transform in self.transforms)

    def __call__(self, img: np.ndarray) -> torch.Tensor:
        if self.shape and img.dtype == np.uint8 and img.ndim == 3 and img.shape[2] == 3:
            out = torch.empty(1, *self.shape, dtype=self.dtype)
            self.write([img], out.numpy(), _from_random(self.draws).T)
            return self.finish(out, out.device)[0].contiguous()
        for transform in self.transforms:
            img = transform(img)
        return img

    def write(self, images: Iterable[np.ndarray], out: np.ndarray, u: np.ndarray) -> None:
        """Apply a fused sequence, without its last two steps, to n images, uint8 (H, W, 3).

        out: uint8 (n, *`shape`), for the results. u: uniform numbers in [0, 1), (n, `draws`).
        """
        images, fused = iter(images), FUSED[self._sequence()]
        for start in range(0, len(out), IN_MEMORY):
            part = slice(start, start + IN_MEMORY)
            fused(list(islice(images, IN_MEMORY)), out[part], u[part], *self.transforms)

    def finish(self, images: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The last two steps of a fused sequence, ToTensor and Normalize, for a batch on `device`.

        uint8 (N, H, W, 3) -> float32 (N, 3, H, W), in the layout channels_last.
        """
        (n, height, width, _), normalize = images.shape, self.transforms[-1]
        scale, shift = _scale_shift(normalize.mean, normalize.std, width, device)
        x = images.to(device, non_blocking=device.type == "cuda").view(n, height, -1).float()
        return torch.addcmul(shift, x, scale, out=x).view(images.shape).permute(0, 3, 1, 2)

    def _sequence(self) -> tuple[type, ...]:
        return tuple(map(type, self.transforms))

    def __repr__(self) -> str:
        return "Compose([\n" + "".join(f"    {t},\n" for t in self.transforms) + "])"


# ---------------------------------------------------------------------------------------------
# The fused path
# ---------------------------------------------------------------------------------------------


IN_MEMORY = 16  # decoded images at a time: enough to share the cost of a NumPy call


def sample_warps(
    u: np.ndarray,
    size: Size,
    scaled: Size,
    flip: RandomHorizontalFlip,
    color: RandomColor,
    rotate: RandomRotate,
    crop: RandomSizedCrop,
) -> tuple[np.ndarray, np.ndarray]:
    """The augmentations of n images: warps (n, 6) and gains per channel (n, 3).

    u: uniform numbers (n, draws), in the order of the transforms. size: (width, height) of the
    images; scaled: after Scale.
    """
    u = np.ascontiguousarray(u.T, float)  # (draws, n)
    of_flip, of_color, of_rotate, of_crop = np.split(u, [1, 4, 5])
    width, height = scaled
    warp = (size[0] / width, 0, 0, 0, size[1] / height, 0)
    flipped = flip.sample(of_flip)
    warp = compose(warp, (np.where(flipped, -1, 1), 0, flipped * width, 0, 1, 0))
    angle = rotate.sample(of_rotate)
    inner = inscribed_size(width, height, angle)
    warp = compose(warp, rotation(scaled, inner, angle))
    x, y, w, h = crop.sample(of_crop, *inner)
    warp = compose(warp, (w / crop.size[0], 0, x, 0, h / crop.size[1], y))
    return np.stack(warp, 1), color.sample(of_color).T


def _train(images, out, u, scale, flip, color, rotate, crop, *_) -> None:
    images, scaled = zip(*(_reduced(img, scale) for img in images), strict=True)
    sizes = np.array([img.shape[1::-1] for img in images]).T
    warps, gains = sample_warps(u, sizes, np.array(scaled).T, flip, color, rotate, crop)
    for img, warp, rgb, result in zip(images, warps.tolist(), gains.tolist(), out, strict=True):
        # OpenCV warps four channels in a third of the time it takes for three
        rgba = cv2.cvtColor(img, cv2.COLOR_RGB2RGBA, dst=_scratch("rgba", *img.shape[:2], 4))
        height, width, _ = result.shape
        warped = warp_image(rgba, warp, crop.size, _scratch("warped", height, width, 4))
        # OpenCV splits twice as fast into planes that exist
        planes = list(_scratch("planes", 4, height, width))
        cv2.split(warped, planes)
        for plane, gain in zip(planes[:3], rgb, strict=True):
            cv2.convertScaleAbs(plane, plane, gain)
        cv2.merge(planes[:3], result)


def _reduced(img: np.ndarray, scale: Scale) -> tuple[np.ndarray, tuple[int, int]]:
    """`img`, scaled where the warp cannot do that, and its (width, height) after Scale."""
    width, height = scale.target(img.shape[1], img.shape[0])
    # the warp reads four source pixels per output pixel: it would alias on a much larger image
    reduced = img.shape[1] > 2 * width or img.shape[0] > 2 * height
    if reduced or scale.interpolation != cv2.INTER_LINEAR:
        img = scale(img)
    return img, (width, height)


def _val(images, out, _u, scale, crop, *_) -> None:
    for img, result in zip(images, out, strict=True):
        result[...] = crop(scale(img))


def _scratch(use: str, *shape: int) -> np.ndarray:
    """Memory that a thread reuses for each image: the pages of new memory would cost more."""
    return _memory(use, shape, threading.get_ident())


@lru_cache(maxsize=32)
def _memory(use: str, shape: tuple[int, ...], thread: int) -> np.ndarray:
    # torch's memory is aligned to 64 bytes; OpenCV splits ten times as slowly into any other
    return torch.empty(shape, dtype=torch.uint8).numpy()


@lru_cache(maxsize=32)
def _scale_shift(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / 255 - mean) / std as x * scale + shift, for a row of pixels: (3 * width,) both."""
    scale, shift = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor(scale * width, device=device), torch.tensor(shift * width, device=device)


AUGMENTATION = (Scale, RandomHorizontalFlip, RandomColor, RandomRotate, RandomSizedCrop)
FUSED = {
    (*AUGMENTATION, ToTensor, Normalize): _train,
    (Scale, CenterCrop, ToTensor, Normalize): _val,
}


def _positive(size: int) -> int:
    if size < 1:
        raise ValueError(f"a size is at least 1 pixel; got {size}")
    return size


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """`size` as (width, height)."""
    width, height = (size, size) if isinstance(size, int) else size
    return _positive(width), _positive(height)


def _from_random(n: int) -> np.ndarray:
    """n uniform numbers (n, 1) from Python's generator."""
    return np.array([[random.random()] for _ in range(n)])


def _between(low: float, high: float, u: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) moved to [low, high)."""
    return low + (high - low) * u


def _interval(name: str, values: Sequence[float], upper: float = math.inf) -> tuple[float, float]:
    low, high = values
    if not 0 < low <= high <= upper:
        raise ValueError(f"{name} needs 0 < low <= high <= {upper}; got {values}")
    return low, high
