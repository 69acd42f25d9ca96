"""Augmentation: each class against its distribution, fused sequences against step by step."""

from __future__ import annotations

import math
import random

import cv2
import numpy as np
import pytest
import torch

from custom_affine import inscribed_size
from custom_transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    Compose,
    Denormalize,
    Normalize,
    RandomColor,
    RandomHorizontalFlip,
    RandomRotate,
    RandomSizedCrop,
    Scale,
    ToTensor,
    sample_warps,
)
from make_sample_data import SCENES, draw_scene

NORMALIZE = Normalize(IMAGENET_MEAN, IMAGENET_STD)
DENORMALIZE = Denormalize(IMAGENET_MEAN, IMAGENET_STD)
TRAIN = [
    Scale(144),
    RandomHorizontalFlip(),
    RandomColor(0.15),
    RandomRotate(15),
    RandomSizedCrop(128),
    ToTensor(),
    NORMALIZE,
]
VAL = [Scale(144), CenterCrop(128), ToTensor(), NORMALIZE]


def step_by_step(transforms, img):
    for transform in transforms:
        img = transform(img)
    return img


def seeded(seed, function, *args):
    random.seed(seed)
    return function(*args)


def drawn(transform, n=1, *size):
    """What `transform` draws for n images, from the generator that it uses when it is called."""
    u = np.array([[random.random() for _ in range(n)] for _ in range(transform.draws)])
    return transform.sample(u, *size)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def position_image(width=128, height=128, scale=1.5):
    """An image that encodes where each pixel came from: red = scale * x, green = scale * y."""
    y, x = np.mgrid[:height, :width] + 0.5
    return np.round(np.stack([x, y, 0 * x], 2) * scale).astype(np.uint8)


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(s, np.random.default_rng(i)) for i in range(6) for s in SCENES]


# --- each class -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((128, 128), 144, (144, 144)),
        ((100, 200), 50, (50, 100)),
        ((200, 100), 50, (100, 50)),
        ((97, 61), (30, 20), (20, 30)),
        ((1, 7), 3, (3, 21)),
    ],
)
def test_scale_sets_the_shorter_side(shape, size, expected):
    assert Scale(size)(noise(*shape)).shape[:2] == expected


def test_scale_is_bilinear_and_the_same_every_time():
    img = noise(90, 120)
    first = Scale(144)(img)
    assert all(np.array_equal(first, Scale(144)(img)) for _ in range(20))
    tensor = torch.from_numpy(img).permute(2, 0, 1)[None].double()
    ours = torch.nn.functional.interpolate(tensor, (144, 192), mode="bilinear")
    assert np.abs(first - ours[0].permute(1, 2, 0).numpy()).max() <= 1


def test_center_crop_cuts_the_middle():
    img = noise(11, 20)
    assert np.array_equal(CenterCrop((6, 5))(img), img[3:8, 7:13])
    with pytest.raises(ValueError, match="cannot crop 12x12 from an image of 20x11"):
        CenterCrop(12)(img)


def test_flip_mirrors_half_of_the_images():
    img = noise(3, 5)
    flipped = [np.array_equal(RandomHorizontalFlip()(img), img[:, ::-1]) for _ in range(2000)]
    assert 900 < sum(flipped) < 1100
    assert np.array_equal(RandomHorizontalFlip(0)(img), img)
    assert np.array_equal(RandomHorizontalFlip(1)(img), img[:, ::-1])


def test_color_multiplies_each_channel_by_its_gain_and_clips():
    img = noise(16, 16)
    for seed in range(20):
        gains = seeded(seed, drawn, RandomColor(0.15))[:, 0]
        ours = seeded(seed, RandomColor(0.15), img)
        assert np.abs(ours - np.clip(img * gains, 0, 255)).max() <= 0.5 + 1e-4
    gains = drawn(RandomColor(0.15), 3000).T
    assert ks_distance(gains.ravel(), np.linspace(0.85, 1.15, 5000)) < 0.03
    assert np.abs(np.corrcoef(gains.T) - np.eye(3)).max() < 0.08


@pytest.mark.parametrize(("width", "height"), [(144, 144), (144, 200), (300, 40), (40, 300)])
@pytest.mark.parametrize("degrees", [0, 3, -10, 15, 44, 45, 46, 90, 135, 180])
def test_inscribed_rectangle_fits_and_no_larger_one_does(width, height, degrees):
    angle = math.radians(degrees)
    w, h = inscribed_size(width, height, angle)
    sin, cos = abs(math.sin(angle)), abs(math.cos(angle))
    a, b = np.meshgrid(np.arange(1, 340), np.arange(1, 340), indexing="ij")
    fits = (a * cos + b * sin <= width + 1e-4) & (a * sin + b * cos <= height + 1e-4)
    assert fits[w - 1, h - 1]
    best = (a * b)[fits].max()
    assert w * h >= best - (w + h + 1)  # the true rectangle, rounded down to whole pixels


def test_rotation_turns_by_the_drawn_angle_and_leaves_no_black_corner():
    img = position_image()
    white = np.full((128, 96, 3), 255, np.uint8)
    angles = []
    for seed in range(300):
        angle = seeded(seed, drawn, RandomRotate(15))[0]
        turned = seeded(seed, RandomRotate(15), img).astype(float)
        assert seeded(seed, RandomRotate(15), white).min() == 255
        across = turned[turned.shape[0] // 2, [8, -9], :2]
        measured = math.atan2(*(across[1] - across[0])[::-1])
        assert measured == pytest.approx(angle, abs=0.02)
        angles.append(math.degrees(angle))
    assert ks_distance(np.array(angles), np.linspace(-15, 15, 3000)) < 0.08


def test_sized_crop_follows_its_law():
    crop = RandomSizedCrop(128)
    x, y, w, h = drawn(crop, 4000, 144, 144)
    assert (x >= 0).all() and (y >= 0).all() and (x + w <= 144).all() and (y + h <= 144).all()
    area, ratio = w * h / 144**2, np.log(w / h)
    assert area.min() > 0.24 and np.abs(ratio).max() < math.log(4 / 3) + 0.03
    assert abs(ratio.mean()) < 0.01
    narrow = area < 0.55  # here every shape fits: nothing is drawn again
    assert ks_distance(area[narrow], np.linspace(0.25, 0.55, 3000)) < 0.05
    limit = math.log(4 / 3)
    assert ks_distance(ratio[narrow], np.linspace(-limit, limit, 3000)) < 0.05
    assert ks_distance((x / np.maximum(144 - w, 1))[narrow], np.linspace(0, 1, 3000)) < 0.05


def test_sized_crop_falls_back_to_the_central_square():
    crop = RandomSizedCrop(8, area_range=(1.0, 1.0))
    assert np.array_equal(drawn(crop, 1, 100, 20), [[40], [0], [20], [20]])
    img = noise(20, 100)
    assert np.array_equal(crop(img), Scale((8, 8))(img[:, 40:60]))


def test_to_tensor_and_normalize_and_back():
    img = noise(5, 7)
    tensor = ToTensor()(img)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 5, 7)
    assert torch.equal(tensor, torch.from_numpy(img).permute(2, 0, 1) / 255)
    assert torch.equal(ToTensor()(img.astype(np.float32)), tensor * 255)
    before = tensor.clone()
    normalized = NORMALIZE(tensor)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    expected = (tensor.permute(1, 2, 0) - mean) / std
    assert torch.allclose(normalized, expected.permute(2, 0, 1), atol=1e-6)
    assert torch.equal(tensor, before)
    batch = torch.stack([tensor, tensor.flip(2)])
    assert torch.allclose(DENORMALIZE(NORMALIZE(batch)), batch, atol=1e-6)
    assert torch.equal(NORMALIZE(batch)[0], normalized)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scale(0),
        lambda: Scale((10, -1)),
        lambda: Scale((1, 2, 3)),
        lambda: CenterCrop(0),
        lambda: RandomSizedCrop(128, area_range=(0.5, 0.2)),
        lambda: RandomSizedCrop(128, area_range=(0.5, 1.2)),
        lambda: RandomSizedCrop(128, ratio_range=(0, 1)),
        lambda: RandomHorizontalFlip(1.5),
        lambda: RandomColor(-0.1),
        lambda: RandomRotate(200),
        lambda: Normalize((0.5, 0.5, 0.5), (1, 1)),
        lambda: Normalize((0.5,), (0,)),
    ],
)
def test_impossible_arguments_are_refused(make):
    with pytest.raises(ValueError):
        make()


def test_compose_reads_like_its_source():
    text = repr(Compose(TRAIN))
    assert repr(eval(text)) == text and "\n    RandomColor(0.15),\n" in text


# --- the fused path -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 128), (96, 160), (200, 130), (50, 60)])
def test_fused_validation_is_the_step_by_step_one(shape):
    img = noise(*shape)
    fused = DENORMALIZE(Compose(VAL)(img)) * 255
    steps = DENORMALIZE(step_by_step(VAL, img)) * 255
    assert fused.shape == steps.shape and fused.dtype == torch.float32
    assert (fused - steps).abs().max() < 0.01  # grey levels; the issue allows 1


def test_fused_training_shows_the_same_picture(scenes):
    """Same random numbers: same region, same colours; only the resampling is sharper."""
    gaps = []
    for seed, img in enumerate(scenes):
        smooth = cv2.GaussianBlur(img, (0, 0), 3)
        fused = seeded(seed, Compose(TRAIN), smooth)
        after_fused = random.random()
        steps = seeded(seed, step_by_step, TRAIN, smooth)
        assert random.random() == after_fused  # as many numbers drawn
        assert fused.shape == steps.shape and fused.dtype == steps.dtype
        gaps.append((DENORMALIZE(fused) - DENORMALIZE(steps)).abs().mean().item() * 255)
    assert max(gaps) < 1.5


@pytest.mark.parametrize("shape", [(128, 128), (100, 170), (170, 100)])
def test_fused_geometry_is_measured_in_the_pixels(shape):
    """Read the source position of the output's corners off a position image, on both paths."""
    plain = [*TRAIN[:2], RandomColor(0), *TRAIN[3:]]
    img = position_image(shape[1], shape[0], scale=1.4)
    gaps = []
    for seed in range(100):
        fused = corners(seeded(seed, Compose(plain), img))
        steps = corners(seeded(seed, step_by_step, plain, img))
        gaps.append((fused - steps) / 1.4)
    gaps = np.array(gaps)  # source pixels, (100, 4, 2); a grey level, lost thrice, is 0.7 of one
    assert np.abs(gaps).max() < 2.2
    assert np.abs(gaps.mean(0)).max() < 0.3


def corners(tensor):
    """The (red, green) grey levels just inside the four corners: (4, 2)."""
    img = DENORMALIZE(tensor)[:2] * 255
    return torch.stack([img[:, y, x] for y in (4, -5) for x in (4, -5)]).numpy()


def test_the_law_of_the_source_regions_is_the_same():
    """Kolmogorov-Smirnov between 1500 fused and 1500 step-by-step regions, seeds apart."""
    plain = [*TRAIN[:2], RandomColor(0), *TRAIN[3:]]
    img = position_image(scale=1.9)
    n = 1500
    fused = np.stack([corners(seeded(seed, Compose(plain), img)) for seed in range(n)])
    steps = np.stack([corners(seeded(n + s, step_by_step, plain, img)) for s in range(n)])
    bound = 1.95 * math.sqrt(2 / n)  # p = 0.001
    for corner in range(4):
        for axis in range(2):
            assert ks_distance(fused[:, corner, axis], steps[:, corner, axis]) < bound
    for measure in (angle, area):
        assert ks_distance(measure(fused), measure(steps)) < bound


def old_law(width, height):
    """The augmentation of one image as `random` alone would draw it: flip, gains, angle, crop."""
    flip, gains = random.random() < 0.5, [random.uniform(0.85, 1.15) for _ in range(3)]
    degrees = random.uniform(-15, 15)
    inner_w, inner_h = map(int, inscribed_size(width, height, math.radians(degrees)))
    for _ in range(10):
        area = inner_w * inner_h * random.uniform(0.25, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= inner_w and h <= inner_h:
            x, y = random.randint(0, inner_w - w), random.randint(0, inner_h - h)
            return [flip, *gains, degrees, x, y, w, h]
    side = min(inner_w, inner_h)
    return [flip, *gains, degrees, (inner_w - side) // 2, (inner_h - side) // 2, side, side]


@pytest.mark.parametrize("size", [(144, 144), (144, 216), (400, 144)])
def test_the_law_of_many_images_is_that_of_one_at_a_time(size):
    n = 4000
    random.seed(1)
    expected = np.array([old_law(*size) for _ in range(n)]).T
    u = np.random.default_rng(2).random((27, n), np.float32).astype(float)
    flip, color, rotate, crop = TRAIN[1:5]
    turn = rotate.sample(u[4:5])
    box = crop.sample(u[5:], *inscribed_size(*size, turn))
    found = [flip.sample(u[:1]), *color.sample(u[1:4]), np.degrees(turn), *box]
    bound = 1.95 * math.sqrt(2 / n)  # p = 0.001
    for ours, theirs in zip(found, expected, strict=True):
        assert ks_distance(ours, theirs) < bound
    together = np.corrcoef(np.stack(found)) - np.corrcoef(expected)
    assert np.abs(together).max() < 0.1


def test_an_augmentation_does_not_depend_on_the_images_drawn_with_it():
    u = np.random.default_rng(3).random((300, Compose(TRAIN).draws), np.float32)
    size = np.random.default_rng(4).integers(60, 500, (2, 300))
    warps, gains = sample_warps(u, size, size, *TRAIN[1:5])
    assert warps.shape == (300, 6) and gains.shape == (300, 3)
    for i in range(300):
        warp, gain = sample_warps(u[[i]], size[:, [i]], size[:, [i]], *TRAIN[1:5])
        assert np.array_equal(warp[0], warps[i]) and np.array_equal(gain[0], gains[i])


def angle(points):
    """The turn of the region's top edge, mirrored or not."""
    edge = points[:, 1] - points[:, 0]
    return np.arctan(edge[:, 1] / edge[:, 0])


def area(points):
    a, b = points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]
    return np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])


def ks_distance(a, b):
    """The largest gap between two empirical distribution functions."""
    points = np.sort(np.concatenate([a, b]))
    cdf = [np.searchsorted(np.sort(v), points, side="right") / len(v) for v in (a, b)]
    return np.abs(cdf[0] - cdf[1]).max()


def test_mean_and_spread_of_the_pixels_are_the_same(scenes):
    fused, steps = [], []
    for seed, img in enumerate(scenes * 3):
        fused.append(seeded(seed, Compose(TRAIN), img))
        steps.append(seeded(seed, step_by_step, TRAIN, img))
    fused, steps = DENORMALIZE(torch.stack(fused)), DENORMALIZE(torch.stack(steps))
    for channel in range(3):
        a, b = fused[:, channel], steps[:, channel]
        assert a.mean().item() == pytest.approx(b.mean().item(), rel=0.01)
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.05)


class Louder(RandomColor):
    """A student's own class: known by its parent, but not the parent."""

    def __call__(self, img):
        return 255 - super().__call__(img)


@pytest.mark.parametrize(
    "sequence",
    [
        [*TRAIN[:2], Louder(0.15), *TRAIN[3:]],
        [TRAIN[0], *TRAIN[2:]],
        [TRAIN[1], TRAIN[0], *TRAIN[2:]],
        [*TRAIN, lambda tensor: tensor * 2],
        TRAIN[:-1],
        TRAIN[:5],
        [],
    ],
)
def test_any_other_sequence_runs_as_it_is_written(sequence):
    img = noise(128, 128)
    ours = seeded(1, Compose(sequence), img)
    theirs = seeded(1, step_by_step, sequence, img)
    assert type(ours) is type(theirs) and np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("interpolation", [cv2.INTER_LINEAR, cv2.INTER_AREA])
def test_much_larger_images_are_scaled_first(interpolation):
    """Fused from 1024 pixels, the warp would read other pixels than Scale(144) does."""
    img = noise(1024, 1024)
    sequence = [Scale(144, interpolation), *TRAIN[1:]]
    for seed in range(5):
        fused = seeded(seed, Compose(sequence), img).ravel()
        steps = seeded(seed, step_by_step, sequence, img).ravel()
        assert torch.corrcoef(torch.stack([fused, steps]))[0, 1] > 0.7


def test_grey_levels_are_not_wrapped_by_the_gain():
    img = np.full((128, 128, 3), 250, np.uint8)
    for seed in range(20):
        out = DENORMALIZE(seeded(seed, Compose(TRAIN), img)) * 255
        assert out.min() > 250 * 0.85 - 1 and out.max() < 255.01
