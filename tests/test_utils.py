"""Image files, learning-rate schedule, running mean."""

from __future__ import annotations

import io
import math
import ntpath
import os
import re
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

import utils
from utils import (
    FORMATS,
    MAX_PIXELS,
    AverageMeter,
    DamagedImageWarning,
    LinearWarmupCosineAnnealingLR,
    UserError,
    load_image,
    relpath,
    resize_image,
    save_image,
    warmup_cosine,
)

CODE = Path(utils.__file__).parent
NOISE = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)
RED, BLUE = (200, 100, 20), (20, 60, 220)


def encode(image, suffix=".png", *options):
    """The bytes of an image file; colours in OpenCV's order, BGR."""
    return cv2.imencode(suffix, image, options)[1].tobytes()


def saved(tmp_path, data):
    (tmp_path / "image").write_bytes(data)
    return tmp_path / "image"


def refusal(path):
    """Why `load_image` refuses a file."""
    with pytest.raises(UserError) as error:
        load_image(path)
    return str(error.value).removeprefix(f"cannot read the image {path}: ")


# --- formats --------------------------------------------------------------------------------


def by_pillow(image, format_, mode="RGB", **options):
    if format_ == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    buffer = io.BytesIO()
    picture = Image.fromarray(image).convert(mode, palette=Image.Palette.ADAPTIVE)
    picture.save(buffer, format_, **options)
    return buffer.getvalue()


def quadrants():
    """Red, blue and black: another orientation, or swapped channels, would show."""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24], image[16:, 24:] = RED, BLUE
    return image


def is_close(image, expected):
    """Equal but for the losses of JPEG, WebP and AVIF."""
    far = np.abs(image.astype(int) - expected).max(2) > 12 if image.shape == expected.shape else 1
    return np.mean(far) < 0.15


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA"])
@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_comes_as_rgb(tmp_path, format_, mode):
    try:
        data = by_pillow(quadrants(), format_, mode)
    except OSError:
        pytest.skip(f"no {format_} file has {mode} pixels")
    image = load_image(saved(tmp_path, data))
    expected = quadrants()
    if mode[0] == "L":
        expected = np.array(Image.fromarray(expected).convert("L").convert("RGB"))
    assert image.dtype == np.uint8 and image.flags.writeable
    assert is_close(image, expected)


TURNED = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WebP", "AVIF", "TIFF"])
def test_the_stated_orientation_is_applied(tmp_path, format_, orientation):
    exif = Image.Exif()
    exif[utils.ORIENTATION] = orientation
    data = by_pillow(quadrants(), format_, exif=exif)
    assert is_close(load_image(saved(tmp_path, data)), TURNED[orientation](quadrants()))


def test_an_orientation_in_xmp_is_applied_and_damaged_exif_is_not(tmp_path):
    upright = load_image(saved(tmp_path, by_pillow(quadrants(), "JPEG")))
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned = load_image(saved(tmp_path, by_pillow(quadrants(), "JPEG", xmp=xmp)))
    assert np.array_equal(turned, np.rot90(upright, -1))
    exif = b"Exif\0\0II*\0\xff\xff\xff\x7f"
    image = load_image(saved(tmp_path, by_pillow(quadrants(), "JPEG", exif=exif)))
    assert np.array_equal(image, upright)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.full((5, 7), 77, np.uint8), (77, 77, 77)),
        (np.full((5, 7, 4), (30, 20, 10, 0), np.uint8), (10, 20, 30)),
        (np.full((5, 7), 0x4D00, np.uint16), (77, 77, 77)),
        (np.full((5, 7, 3), (0x1E00, 0x1400, 0xA00), np.uint16), (10, 20, 30)),
        (np.full((5, 7, 4), (0x1E00, 0x1400, 0xA00, 0), np.uint16), (10, 20, 30)),
        (np.full((1, 1, 3), (30, 20, 10), np.uint8), (10, 20, 30)),
    ],
    ids=["grey", "alpha", "16-bit grey", "16-bit", "16-bit alpha", "1x1"],
)
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_alpha_is_dropped_and_16_bits_become_8(tmp_path, image, expected, suffix):
    loaded = load_image(saved(tmp_path, encode(image, suffix)))
    assert loaded.dtype == np.uint8 and loaded.shape == (*image.shape[:2], 3)
    assert (loaded == expected).all()


def test_16_bit_pgm_and_cmyk(tmp_path):
    pgm = b"P5 2 1 65535\n" + bytes([77, 0, 200, 0])
    assert load_image(saved(tmp_path, pgm))[0].tolist() == [[77] * 3, [200] * 3]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    assert np.abs(load_image(tmp_path / "red.jpg").astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("orientation", [1, 6])
def test_jpegs_with_fill_bytes_or_a_tail_are_whole(tmp_path, orientation):
    """Some cameras pad segments (ITU-T T.81, B.1.1.2); phones append a film or a second image."""
    exif = Image.Exif()
    exif[utils.ORIENTATION] = orientation
    jpeg, thumbnail = by_pillow(NOISE, "JPEG", exif=exif), by_pillow(NOISE[:8, :8], "JPEG")
    framed = by_pillow(NOISE, "JPEG", exif=exif, comment=thumbnail)
    plain = load_image(saved(tmp_path, jpeg))
    padded = jpeg
    for marker in (b"\xdb", b"\xc0", b"\xda"):
        padded = padded.replace(b"\xff" + marker, b"\xff" * 5 + marker)
    for data in (padded, jpeg + b"tail", padded + bytes(1000), framed + thumbnail[:90]):
        assert np.array_equal(load_image(saved(tmp_path, data)), plain)
    with pytest.raises(UserError, match="the file is cut off"):
        load_image(saved(tmp_path, framed[:-90]))


JPEG_OPTIONS = {
    "4:4:4": [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111],
    "4:2:2": [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x211111],
    "4:2:0": [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x221111],
    "4:1:1": [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x411111],
    "progressive": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
    "restarts": [cv2.IMWRITE_JPEG_RST_INTERVAL, 2],
    "grey": [],
}


@pytest.mark.parametrize("kind", JPEG_OPTIONS)
def test_both_libraries_read_the_same_pixels_from_a_jpeg(tmp_path, kind, monkeypatch):
    """Whether simplejpeg is installed must not change a figure."""
    if utils.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    noise = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    for image in (noise, cv2.GaussianBlur(noise, (7, 7), 0)):
        for quality in (30, 75, 100):
            options = [*JPEG_OPTIONS[kind], cv2.IMWRITE_JPEG_QUALITY, quality]
            grey = image[..., 0] if kind == "grey" else image
            path = saved(tmp_path, encode(grey, ".jpg", *options))
            with monkeypatch.context() as patch:
                patch.setattr(utils, "simplejpeg", None)
                expected = load_image(path)
            assert np.array_equal(load_image(path), expected), quality


# --- damage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tiff", ".ppm", ".gif"])
def test_a_file_that_was_cut_off_is_refused_wherever_it_was_cut(tmp_path, suffix):
    """Decoders would fill up a JPEG in grey."""
    data = by_pillow(NOISE, {".jpg": "JPEG", ".tiff": "TIFF"}.get(suffix, suffix[1:].upper()))
    whole = load_image(saved(tmp_path, data))
    for length in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 1]:
        # a download that had reserved its space is full of zeros; some formats do not show it
        for padding in (b"", bytes(200))[: 1 + (suffix in (".jpg", ".png"))]:
            path = saved(tmp_path, data[:length] + padding)
            try:
                assert np.array_equal(load_image(path), whole), (length, padding)
            except UserError as e:
                assert re.fullmatch(f"cannot read the image {path}: .*", str(e))


def test_damage_inside_a_jpeg_is_a_warning_and_still_a_picture(tmp_path):
    if utils.simplejpeg is None:
        pytest.skip("only simplejpeg reports damage")
    jpeg = bytearray(encode(NOISE, ".jpg"))
    jpeg[-400:-200] = bytes(200)
    path = saved(tmp_path, bytes(jpeg))
    with pytest.warns(DamagedImageWarning, match=f"^the image {path} is damaged: Corrupt JPEG"):
        assert load_image(path).shape == NOISE.shape
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(saved(tmp_path, encode(NOISE, ".jpg")))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"<html>quota exceeded</html>", "it is damaged or not an image (JPEG, PNG, WebP, "),
        (b"\xff\xd8\xff", "the file is cut off"),
        (b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 3\nMAXVAL 255\nENDHDR\nabc", "it is damaged or not an i"),
        (b"Pf 1 1 -1\n\0\0\0\0", "its pixels are numbers of 32 bits"),
        (encode(np.zeros((1, 101, 3), np.uint8)), "101×1 pixels are a strip"),
        (encode(np.zeros((101, 1, 3), np.uint8), ".jpg"), "1×101 pixels are a strip"),
    ],
    ids=["empty", "web page", "JPEG's head", "PAM", "float", "strip", "JPEG strip"],
)
def test_what_is_no_picture_is_refused(tmp_path, data, reason):
    assert refusal(saved(tmp_path, data)).startswith(reason)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_missing_files_folders_pipes_and_devices_are_no_images(tmp_path):
    assert refusal(tmp_path / "x.jpg") == "No such file or directory"
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    for path in tmp_path.iterdir():
        assert refusal(path) == "it is not a file"


def png_of_zeros(side):
    """A grey square, a thousandth of the size of its pixels."""

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + checksum

    row, packer = bytes(side + 1), zlib.compressobj(1)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


MEMORY = """
import resource, sys
from utils import UserError, load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        load_image(path)
    except UserError as e:
        print(str(e).split(": ")[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is the system's own")
def test_decompression_bombs_are_refused_before_they_take_the_memory(tmp_path):
    pixels, part, claim = (tmp_path / name for name in ("many pixels", "long part", "claim"))
    pixels.write_bytes(png_of_zeros(16_384))
    part.write_bytes(png_of_zeros(9).replace(b"\0\0\0\x0dIHDR", b"\x7f\xff\xff\xffIHDR"))
    jpeg = encode(NOISE, ".jpg")
    size = jpeg.index(b"\xff\xc0") + 5
    claim.write_bytes(jpeg[:size] + b"\x40\0\x40\0" + jpeg[size + 4 :])  # 16,384 squared
    words = [sys.executable, "-c", MEMORY, str(pixels), str(part), str(claim)]
    done = subprocess.run(words, cwd=CODE, capture_output=True, text=True, check=True)
    *lines, megabytes = done.stdout.splitlines()
    too_large = f"it has over {MAX_PIXELS:,} pixels"
    assert lines == [too_large, utils.UNREADABLE, too_large]
    assert int(megabytes) < 50 and done.stderr == ""


# --- writing, resizing, naming --------------------------------------------------------------


def test_image_files_keep_channel_order_and_non_ascii_names(tmp_path):
    save_image(tmp_path / "bild-ä.png", NOISE)
    assert np.array_equal(load_image(tmp_path / "bild-ä.png"), NOISE)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    image = np.zeros((2, 2, 3), np.uint8)
    for path in (tmp_path / "missing" / "x.png", tmp_path / "x.unknown"):
        with pytest.raises(UserError, match=path.name):
            save_image(path, image)


def test_resize_takes_width_before_height():
    assert resize_image(np.zeros((4, 6, 3), np.uint8), (12, 2)).shape == (2, 12, 3)


def test_a_place_on_another_drive_is_named_in_full(monkeypatch):
    assert relpath(os.path.abspath("logs")) == "logs"
    monkeypatch.setattr(os.path, "relpath", ntpath.relpath)  # as it is on Windows
    assert relpath("logs") == "logs"
    assert relpath("D:\\logs\\run") == "D:\\logs\\run"


# --- schedule and meter -----------------------------------------------------------------------

PEAK, END = 0.1, 1e-8


def rates(warmup, total, steps, start_at=0):
    """The learning rate that each of `steps` optimizer steps is taken with."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    for group in optimizer.param_groups:
        group["initial_lr"] = PEAK
    scheduler = LinearWarmupCosineAnnealingLR(optimizer, warmup, total, last_epoch=start_at - 1)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_rate_climbs_from_zero_then_falls_as_torchs_own_cosine():
    got = rates(warmup=10, total=50, steps=50)
    assert got[:11] == pytest.approx([PEAK * i / 10 for i in range(11)])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=END)
    for i in range(10, 50):
        assert got[i] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        cosine.step()


def test_without_warmup_the_first_step_has_the_full_rate():
    assert rates(warmup=0, total=20, steps=1) == [PEAK]


def test_past_the_horizon_the_rate_stays_at_its_floor():
    assert rates(warmup=2, total=10, steps=30)[10:] == [END] * 20


@given(st.integers(0, 40), st.integers(1, 60), st.integers(0, 80))
def test_starting_midway_gives_the_rates_of_a_run_from_the_start(warmup, total, start_at):
    whole = rates(warmup, total, start_at + 3)
    assert rates(warmup, total, 3, start_at) == whole[start_at:]


@given(st.integers(0, 100), st.integers(1, 200), st.integers(0, 400))
def test_rate_stays_between_start_and_peak(warmup, total, step):
    assert 0 <= warmup_cosine(step, warmup, total, 0.0, PEAK, END) <= PEAK


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 50)), min_size=1, max_size=20))
def test_meter_weighs_each_value_by_its_count(updates):
    meter = AverageMeter()
    for value, n in updates:
        meter.update(value, n)
    count = sum(n for _, n in updates)
    assert meter.count == count and meter.val == updates[-1][0]
    mean = math.fsum(v * n for v, n in updates) / count
    assert meter.avg == pytest.approx(mean, abs=1e-6)
    assert meter.sum == pytest.approx(meter.avg * count, abs=1e-6)
    meter.reset()
    assert (meter.val, meter.avg, meter.sum, meter.count) == (0, 0, 0, 0)
