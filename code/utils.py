"""Small tools that every part shares: image files, a running mean, the learning-rate schedule."""

from __future__ import annotations

import io
import math
import os
import re
import stat
import warnings
from pathlib import Path

import cv2
import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

try:
    import simplejpeg  # Pillow's pixels in 60 % of its time, and it reports damage
except ImportError:
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WebP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
DECODER = f"Pillow {PIL.__version__}, simplejpeg {simplejpeg and simplejpeg.__version__}"
MAX_PIXELS, MAX_RATIO = 2**26, 100

UNREADABLE = f"it is damaged or not an image ({', '.join(FORMATS)})"
TOO_LARGE = f"it has over {MAX_PIXELS:,} pixels"
ORIENTATION = 0x0112  # the EXIF tag
MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")  # of a JPEG segment with a length


class UserError(Exception):
    """A mistake that the user can fix; its message is the one line that is printed."""


class DamagedImageWarning(UserWarning):
    """An image decodes, but its decoder reports damage: some of its pixels may be wrong."""


def load_image(path: str | Path) -> np.ndarray:
    """Read an image file of one of the `FORMATS` as RGB, uint8, (H, W, 3).

    Grey, palette, CMYK, alpha and 16-bit files are converted to 8-bit RGB (alpha is dropped); the
    orientation that the file states is applied; of several frames the first is read.

    Warns:
        DamagedImageWarning: a JPEG decodes with errors (found where simplejpeg is installed).

    Raises:
        UserError: the file is missing, unreadable, cut off, not an image, or too large to decode:
            above 67 million pixels, or a strip that scaling by its shorter side would blow up.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would never end
            raise UserError("it is not a file")
        image, damage = _decode(Path(path).read_bytes())
    except OSError as e:
        raise UserError(f"cannot read the image {path}: {e.strerror or e}") from None
    except UserError as e:
        raise UserError(f"cannot read the image {path}: {e}") from None
    if damage:
        warnings.warn(f"the image {path} is damaged: {damage}", DamagedImageWarning, stacklevel=2)
    return image


def _decode(data: bytes) -> tuple[np.ndarray, str]:
    """The pixels, RGB uint8 (H, W, 3), and what the decoder reports of damage, or ""."""
    if not data.startswith(b"\xff\xd8"):
        return _decode_by_pillow(data), ""
    if _is_cut_off(data):
        raise UserError("the file is cut off")
    image, damage = _decode_jpeg(data) if simplejpeg else (None, "")
    return _decode_by_pillow(data) if image is None or _is_turned(data) else image, damage


def _decode_jpeg(data: bytes) -> tuple[np.ndarray | None, str]:
    """As `_decode`, as stored; None if Pillow must decide."""
    damage = ""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        try:
            return simplejpeg.decode_jpeg(data), ""
        except ValueError as e:
            damage = str(e)
        return simplejpeg.decode_jpeg(data, strict=False), damage
    except ValueError:
        return None, ""


def _decode_by_pillow(data: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():  # Pillow warns about metadata
            warnings.simplefilter("ignore")
            picture = _open(data)
            _check_size(*picture.size)
            if picture.format == "PNG":  # its decoder ignores checksums
                picture.verify()
                picture = _open(data)
            has_16_bits = picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode[0] in "IF":
                return _from_wide_grey(picture, has_16_bits)
            return np.array(picture.convert("RGB"))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(TOO_LARGE) from None
    except Exception:  # Pillow passes on any exception of its parsers
        raise UserError(UNREADABLE if data else "it is empty") from None


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _from_wide_grey(picture: Image.Image, has_16_bits: bool) -> np.ndarray:
    if not has_16_bits or picture.mode[0] == "F":
        raise UserError("its pixels are numbers of 32 bits, of unknown range")
    return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[..., None], 3, axis=2)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(TOO_LARGE)
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UserError(f"{width}×{height} pixels are a strip")


def _is_turned(jpeg: bytes) -> bool:
    """Whether EXIF or XMP data state another orientation than that of the stored pixels."""
    if b"Exif" not in jpeg and b"tiff:Orientation" not in jpeg:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _open(jpeg).getexif().get(ORIENTATION, 1) != 1
    except Exception:  # damaged metadata state nothing
        return False


def _is_cut_off(jpeg: bytes) -> bool:
    """Whether no end marker follows the first scan; decoders would fill the rest with grey.

    The segments before the scan are skipped: a thumbnail among them has its own end marker. Fill
    bytes before a marker are legal (ITU-T T.81, B.1.1.2), and so are bytes after the end.
    """
    if jpeg.endswith(b"\xff\xd9"):
        return False
    at = 2
    while marker := MARKER.search(jpeg, at):
        at = marker.end()
        if marker[1] == b"\xda":  # start of scan
            return b"\xff\xd9" not in jpeg[at:]
        at += int.from_bytes(jpeg[at : at + 2], "big")
    return True


def relpath(path: str | Path) -> str:
    """`path` relative to the working folder; unchanged if it is on another Windows drive."""
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
        """Forget all values."""
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
    3. later: `end`, for a run that continues past its horizon.
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
        """The learning rate of each parameter group at iteration `last_epoch`."""
        return self.rates(self.last_epoch)

    def rates(self, step: int) -> list[float]:
        """The rate of each parameter group at any step."""
        return [
            warmup_cosine(step, self.warmup, self.max, self.warmup_start_lr, base, self.eta_min)
            for base in self.base_lrs
        ]
