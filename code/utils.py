"""Small tools that every part shares: image files, a running mean, the learning-rate schedule."""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path

import numpy as np
import torch

MAX_PIXELS, MAX_RATIO = 2**26, 100

# OpenCV reads these when it is loaded. By itself it decodes up to 2**30 pixels, 3 GB, of a tiny
# file, and prints lines of its own beside the errors that it returns.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
import cv2  # noqa: E402

try:
    import simplejpeg  # the same pixels in two thirds of OpenCV's time
except ImportError:
    simplejpeg = None

READS_RGB = hasattr(cv2, "IMREAD_COLOR_RGB")  # from OpenCV 4.11 on
READ_COLOR = cv2.IMREAD_COLOR_RGB if READS_RGB else cv2.IMREAD_COLOR


class UserError(Exception):
    """A mistake the user can mend; its message is the one line they are shown."""


def load_image(path: str | Path) -> np.ndarray:
    """Read an image file as RGB, uint8, (H, W, 3).

    Grey, CMYK, alpha and 16-bit files are converted to 8-bit RGB; an EXIF rotation is applied.

    Raises:
        UserError: the file is missing, unreadable, cut off, not an image, or too large to decode:
            above 67 million pixels, or a strip that scaling by its shorter side would blow up.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end
            raise UserError(f"cannot read the image {path}: it is not a file")
        # not cv2.imread, which cannot open non-ASCII paths on Windows, and fills up a JPEG that
        # was cut off
        with open(path, "rb", buffering=0) as file:
            data = file.read()
        image = None if _is_cut_off(data) else _decode(data)
    except OSError as e:
        raise UserError(f"cannot read the image {path}: {e.strerror or e}") from None
    except cv2.error as e:
        large = "MAX_IMAGE" in str(e)
        reason = f"it has over {MAX_PIXELS:,} pixels" if large else "it is empty or damaged"
        raise UserError(f"cannot read the image {path}: {reason}") from None
    if image is None:
        raise UserError(f"cannot read the image {path}: it is damaged or not an image")
    height, width = image.shape[:2]
    if max(height, width) > MAX_RATIO * min(height, width):
        raise UserError(f"cannot read the image {path}: {width}×{height} pixels are a strip")
    return image


def _decode(data: bytes) -> np.ndarray | None:
    """RGB; None if no image is found in `data`."""
    if simplejpeg and b"Exif" not in data:  # it would leave a turned image as it lies
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            if height * width <= MAX_PIXELS:
                return simplejpeg.decode_jpeg(data)
        except ValueError:  # no JPEG, one of CMYK, or a damaged one: OpenCV's to judge
            pass
    image = cv2.imdecode(np.frombuffer(data, np.uint8), READ_COLOR)
    return image if READS_RGB or image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _is_cut_off(data: bytes) -> bool:
    """Whether a JPEG has no end marker, or a PNG's part claims to go on past the end of the file.

    OpenCV may decode the first, when zeros follow: a download had reserved its space. For the
    second it reserves what the part claims, up to 4 GB, before it notices.
    """
    if data.startswith(b"\xff\xd8") and not data.endswith(b"\xff\xd9"):
        at = 2
        while data[at : at + 2] not in (b"\xff\xda", b""):  # a thumbnail has end markers of its own
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        return b"\xff\xd9" not in data[at:]
    if data.startswith(b"\x89PNG"):
        at = 8
        while at < len(data) and data[at + 4 : at + 8] != b"IEND":
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        return at + 12 > len(data)
    return False


def relpath(path: str | Path) -> str:
    """`path` as seen from the working folder; unchanged if on another of Windows' drives."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def save_image(path: str | Path, img: np.ndarray) -> None:
    """Write an RGB uint8 (H, W, 3) array; the file type follows from the suffix.

    Raises:
        UserError: the folder is missing or not writable, or the suffix is unknown.
    """
    try:
        encoded = cv2.imencode(Path(path).suffix, cv2.cvtColor(img, cv2.COLOR_RGB2BGR))[1]
        encoded.tofile(path)
    except (OSError, cv2.error) as e:
        raise UserError(f"cannot write the image {path}: {e}") from None


def resize_image(
    img: np.ndarray, size: tuple[int, int], interpolation: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """Resize an (H, W, C) array to size = (width, height)."""
    return cv2.resize(img, size, interpolation=interpolation)


class AverageMeter:
    """The last value and the running mean of a quantity."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.val = self.avg = self.sum = 0.0
        self.count = 0

    def update(self, val: float, n: int = 1) -> None:
        """Add `val`, the mean over `n` samples."""
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count if self.count else 0.0


def warmup_cosine(
    step: int, warmup: int, total: int, start: float, peak: float, end: float
) -> float:
    """The learning rate of one step.

    1. step < warmup: a line from `start` to `peak`;
    2. warmup <= step < total: half a cosine down to `end` (Loshchilov & Hutter, 2017, eq. 5);
    3. later: `end`, for a run that goes on past its horizon.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    if step < total:
        progress = (step - warmup) / (total - warmup)
        return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2
    return end


class LinearWarmupCosineAnnealingLR(torch.optim.lr_scheduler.LRScheduler):
    """`warmup_cosine` as a torch scheduler; `warmup` and `max` count iterations.

    The rate is a pure function of `last_epoch` (the iteration), so a scheduler that was set to any
    iteration, past the horizon included, gives the rate a run from the start would have there.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup: int,
        max: int,  # noqa: A002 - the course's name
        warmup_start_lr: float = 0.0,
        eta_min: float = 1e-8,
        last_epoch: int = -1,
    ) -> None:
        self.warmup, self.max = warmup, max
        self.warmup_start_lr, self.eta_min = warmup_start_lr, eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        return self.rates(self.last_epoch)

    def rates(self, step: int) -> list[float]:
        """The rate of each parameter group at any step."""
        return [
            warmup_cosine(step, self.warmup, self.max, self.warmup_start_lr, base, self.eta_min)
            for base in self.base_lrs
        ]
