"""Random views: crops, colours, gradients, seeds."""

from __future__ import annotations

import itertools

import pytest
import torch
from reverse_toys import random
from torch.utils._python_dispatch import TorchDispatchMode

from reverse_attack.views import crop, hue_rotation, jitter_colour, views


class Copies(TorchDispatchMode):
    """Collects the operations that move values from one device to another."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        if len({t.device for t in tensors if t.dim() > 0}) > 1:
            self.found.append(function)
        return result


def test_views_on_a_device_copy_nothing_to_it():
    """ "meta" stands for it; a read of a value would fail there."""
    x = torch.empty(5, 3, 8, 8, device="meta")
    views(x, 2)  # constants are copied once
    copies = Copies()
    copies.found = []
    with copies:
        assert views(x, 2).shape == (5, 2, 3, 8, 8)
    assert not copies.found


def test_every_view_is_drawn_by_itself_and_follows_the_seed():
    x = random(1, 3, 16, 16).expand(3, -1, -1, -1)
    batch = views(x, 4, torch.Generator().manual_seed(5))
    assert batch.shape == (3, 4, 3, 16, 16)
    assert batch.min() >= 0 and batch.max() <= 1
    flat = batch.flatten(0, 1)
    for a, b in itertools.combinations(flat, 2):
        assert (a - b).abs().max() > 0.01
    assert torch.equal(batch, views(x, 4, torch.Generator().manual_seed(5)))


def test_views_are_differentiable():
    x = (0.3 + 0.4 * random(2, 3, 8, 8)).double().requires_grad_(True)

    def mean_of_views(x):
        return views(x, 2, torch.Generator().manual_seed(1)).square().mean((2, 3, 4))

    assert torch.autograd.gradcheck(mean_of_views, x, eps=1e-6, atol=1e-5, nondet_tol=1e-9)


def test_crops_are_straight_windows_of_every_size_half_of_them_mirrored():
    ramp = (torch.arange(32) + 0.5) / 32
    across, down = ramp.expand(32, 32), ramp[:, None].expand(32, 32)
    x = torch.stack([across, down, torch.zeros(32, 32)]).expand(500, -1, -1, -1)
    batch = crop(x, torch.Generator().manual_seed(0))
    slope_x = batch[:, 0, :, 8:24].diff(dim=2).mean((1, 2)) * 32  # width of the window, signed
    slope_y = batch[:, 1, 8:24].diff(dim=1).mean((1, 2)) * 32
    assert batch[:, 0].diff(dim=1).abs().max() < 1e-5  # rows stay rows
    area = slope_x.abs() * slope_y
    assert 0.19 < area.min() < 0.25 and 0.85 < area.max() <= 1.01
    assert (slope_y > 0).all()
    assert 0.4 < (slope_x < 0).float().mean() < 0.6


def test_colours_are_those_of_torchvisions_operations_in_order():
    functional = pytest.importorskip("torchvision.transforms.functional", reason="optional here")
    x = 0.4 + 0.1 * random(1, 3, 6, 6)
    for seed in range(30):
        batch = jitter_colour(x, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        jittered = torch.rand(1, generator=generator) < 0.8
        b, c, s = (0.2 + 1.6 * torch.rand(1, generator=generator) for _ in range(3))
        turn = -0.2 + 0.4 * torch.rand(1, generator=generator)
        grey = torch.rand(1, generator=generator) < 0.2
        if grey or not jittered:  # torchvision's hue goes by HSV, ours by YIQ: without hue
            expected = x
            if jittered:
                luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
                mean = (b * x * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
                expected = c * b * x + (1 - c) * mean
            if grey:
                expected = functional.rgb_to_grayscale(expected, 3)
            torch.testing.assert_close(batch, expected, atol=2e-4, rtol=2e-3)
        else:
            matrix = hue_rotation(turn)[0]
            rotated = torch.einsum("ij,njhw->nihw", torch.linalg.inv(matrix), batch)
            mean = (functional.rgb_to_grayscale(b * x)).mean()
            expected = x * b * c + (1 - c) * mean
            grey_of = functional.rgb_to_grayscale(expected, 3)
            torch.testing.assert_close(
                rotated, s * expected + (1 - s) * grey_of, atol=2e-3, rtol=2e-3
            )


def test_a_turn_of_the_hue_keeps_grey_and_comes_round():
    for turn in (0.0, 1.0):
        torch.testing.assert_close(
            hue_rotation(torch.tensor([turn]))[0], torch.eye(3), atol=1e-5, rtol=0
        )
    third = hue_rotation(torch.tensor([1 / 3]))[0]
    torch.testing.assert_close(third @ torch.ones(3), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(third @ third @ third, torch.eye(3), atol=1e-4, rtol=0)
    assert (third - torch.eye(3)).abs().max() > 0.5


def test_min_crop_bounds_the_area_of_every_crop():
    ramp = ((torch.arange(32) + 0.5) / 32).expand(32, 32)
    x = torch.stack([ramp, ramp.T, torch.zeros(32, 32)]).expand(500, -1, -1, -1)
    for min_crop in (0.08, 0.6):
        batch = crop(x, torch.Generator().manual_seed(0), min_crop)
        width = batch[:, 0, :, 8:24].diff(dim=2).mean((1, 2)) * 32
        height = batch[:, 1, 8:24].diff(dim=1).mean((1, 2)) * 32
        smallest = (width.abs() * height).min()
        assert 0.95 * min_crop < smallest < 1.3 * min_crop
