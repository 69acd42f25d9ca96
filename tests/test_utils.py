"""Schedule, meter and image files."""

import math
import ntpath
import os

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import utils
from utils import (
    AverageMeter,
    LinearWarmupCosineAnnealingLR,
    UserError,
    load_image,
    relpath,
    resize_image,
    save_image,
    warmup_cosine,
)

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


def test_image_files_keep_channel_order_and_non_ascii_names(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    save_image(tmp_path / "bild-ä.png", image)
    assert np.array_equal(load_image(tmp_path / "bild-ä.png"), image)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_alpha_and_16_bit_files_come_as_8_bit_rgb(tmp_path, shape, dtype):
    level = 200 if dtype is np.uint8 else 200 * 257
    cv2.imwrite(str(tmp_path / "x.png"), np.full(shape, level, dtype))
    image = load_image(tmp_path / "x.png")
    assert image.shape == (6, 4, 3) and image.dtype == np.uint8 and (image == 200).all()


def loaded_without(library, name, path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, name, None)
        return load_image(path)


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
def test_both_libraries_read_the_same_pixels_from_a_jpeg(tmp_path, kind):
    """Whether simplejpeg is installed must not change a figure."""
    if utils.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    noise = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    path = tmp_path / "x.jpg"
    for image in (noise, cv2.GaussianBlur(noise, (7, 7), 0)):
        for quality in (30, 75, 100):
            options = [*JPEG_OPTIONS[kind], cv2.IMWRITE_JPEG_QUALITY, quality]
            cv2.imwrite(str(path), image[..., 0] if kind == "grey" else image, options)
            by_opencv = loaded_without(utils, "simplejpeg", path)
            assert np.array_equal(loaded_without(cv2, "imdecode", path), by_opencv), quality


@pytest.mark.parametrize("content", [None, b"", b"<html>quota exceeded</html>", b"\xff\xd8\xff"])
def test_an_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "x.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the image .*x\.jpg"):
        load_image(path)


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
