"""Pictures: pixels, differences, overlays, captions, against their definitions."""

import cv2
import numpy as np
import pytest
import torch

from custom_transforms import IMAGENET_MEAN, IMAGENET_STD
from deepvision.evaluation import pictures

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))


def test_pixels_and_differences_are_in_true_colours():
    levels = torch.tensor([[[[0, 128]], [[255, 64]], [[3, 200]]]])  # (1, 3, 1, 2)
    x = (levels / 255 - MEAN) / STD
    assert pictures.pixels(x).tolist() == levels.permute(0, 2, 3, 1).tolist()
    moved = x + 4 / 255 / STD
    shown = pictures.pixels(pictures.difference(x, moved, 10)).astype(int)
    assert (abs(shown - (127.5 + 40)) <= 1).all()


def test_overlays_are_red_where_the_map_is_high():
    images = np.full((1, 2, 2, 3), 100, np.uint8)
    over = pictures.overlay(images, torch.tensor([[[1.0, 0.0], [0.25, 0.0]]]))[0]
    w = pictures.MAX_WEIGHT
    red = [round(100 * (1 - w) + 255 * w), round(100 * (1 - w)), round(100 * (1 - w))]
    assert over[0, 0].tolist() == red and over[0, 1].tolist() == [100] * 3
    assert over[0, 0, 0] > over[1, 0, 0] > over[0, 1, 0]


def test_an_overlay_shows_the_picture_below_the_highest_map():
    images = np.stack([np.full((4, 4, 3), v, np.uint8) for v in (0, 255)])
    dark, bright = pictures.overlay(images, torch.ones(2, 4, 4)).astype(int)
    assert (bright - dark)[..., 1:].min() >= 0.3 * 255


def test_normalised_inverts_pixels():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3)).astype(np.uint8)
    assert np.array_equal(pictures.pixels(pictures.normalised(images)), images)


def test_answers_name_the_most_likely_category():
    logits = torch.tensor([[0.0, 2.0, 0.0], [5.0, 0.0, 0.0]])
    share = 100 * logits.softmax(1).amax(1)
    expected = [f"pier {share[0]:.0f} %", f"abbey {share[1]:.0f} %"]
    assert pictures.format_predictions(logits, ["abbey", "pier", "zoo"]) == expected


@pytest.mark.parametrize("name", ["swimming pool, outdoor 63 %", "subway station, platform 8 %"])
def test_long_names_are_wrapped_and_whole(name):
    lines = pictures.wrap(f"true: {name}")
    assert len(lines) > 1 and " ".join(lines) == f"true: {name}"
    widths = [cv2.getTextSize(t, pictures.FONT, pictures.SCALE, 1)[0][0] for t in lines]
    assert max(widths) <= pictures.TILE - 8


def test_tiles_stand_in_reading_order_above_their_captions():
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    captions = [["café " + "w" * 80, "b"], ["a"], ["b"]]
    tiles = [
        pictures.tile(np.full((128, 128, 3), c, np.uint8), text)
        for c, text in zip(colours, captions, strict=True)
    ]
    size, height = pictures.TILE, len(tiles[0])
    assert height > len(tiles[1]) > size and tiles[0][size:].max() > 200  # letters
    assert (tiles[0][size:, -3:] == 0).all()  # that end before the edge
    picture = pictures.grid(tiles, 2)
    assert picture.shape == (3, height + len(tiles[2]), 2 * size)
    corners = [(0, 0), (0, size), (height, 0), (height, size)]
    seen = [tuple((255 * picture[:, r, c]).round().int().tolist()) for r, c in corners]
    assert seen == [*colours, (0, 0, 0)]
