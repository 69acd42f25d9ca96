"""Saliency and Grad-CAM against their formulas, what they leave behind, and the pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from custom_transforms import IMAGENET_MEAN, IMAGENET_STD
from deepvision.evaluation import pictures
from deepvision.evaluation.saliency import grad_cam, saliency
from student_code import CustomConv2d, SimpleNet, SimpleViT

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))


@pytest.fixture(params=[nn.Conv2d, CustomConv2d], ids=["torch", "custom"])
def net(request) -> nn.Module:
    torch.manual_seed(0)
    model = SimpleNet(conv_op=request.param, num_classes=5).train()
    model.fc.bias.requires_grad_(False)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_saliency_is_the_gradient_of_the_winning_classs_loss(net, x):
    maps, logits = saliency(net, x)
    leaf = x.clone().requires_grad_(True)
    out = net.eval()(leaf)
    label = out.argmax(1)
    (-out.log_softmax(1).gather(1, label[:, None])).sum().backward()
    expected = leaf.grad.abs().amax(1)
    expected = expected / expected.flatten(1).amax(1).view(-1, 1, 1)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(logits, out.detach())


def test_grad_cam_is_equations_1_and_2(net, x):
    maps = grad_cam(net, x)
    net.eval()
    A = net.features[:15](x).clone()  # the last convolution and its ReLU, which works in place
    leaf = net.features[14](net.features[:14](x)).relu().detach().requires_grad_(True)
    torch.testing.assert_close(leaf.detach(), A.relu())
    logits = net.fc(net.avgpool(leaf).flatten(1))
    logits.max(1).values.sum().backward()
    a = leaf.grad.sum((2, 3)) / leaf[0, 0].numel()
    cam = torch.einsum("nk,nkhw->nhw", a, leaf.detach()).relu()
    cam = F.interpolate(cam[:, None], (64, 64), mode="bilinear")[:, 0]
    torch.testing.assert_close(maps, cam / cam.flatten(1).amax(1).view(-1, 1, 1))


def test_a_transformer_has_a_gradient_map_and_no_grad_cam():
    torch.manual_seed(0)
    model = SimpleViT(img_size=64, num_classes=5, embed_dim=16, depth=2, num_heads=2)
    x = torch.randn(2, 3, 64, 64)
    assert grad_cam(model, x) is None
    maps = saliency(model, x)[0]
    assert maps.shape == (2, 64, 64) and maps.flatten(1).amax(1).tolist() == [1, 1]


def test_they_leave_no_trace(net, x):
    before = {name: v.clone() for name, v in net.state_dict().items()}
    needs = [p.requires_grad for p in net.parameters()]
    with torch.inference_mode():
        x = x + 0
    saliency(net, x), grad_cam(net, x)
    assert all(torch.equal(v, before[name]) for name, v in net.state_dict().items())
    assert all(m.training for m in net.modules())
    assert [p.requires_grad for p in net.parameters()] == needs
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())


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
    assert over[0, 0].tolist() == [255, 0, 0]
    assert len(set(over[0, 1].tolist())) == 1  # grey
    assert over[0, 0, 0] > over[1, 0, 0] > over[0, 1, 0]


def test_answers_name_the_most_likely_category():
    logits = torch.tensor([[0.0, 2.0, 0.0], [5.0, 0.0, 0.0]])
    share = 100 * logits.softmax(1).amax(1)
    expected = [f"pier {share[0]:.0f} %", f"abbey {share[1]:.0f} %"]
    assert pictures.format_predictions(logits, ["abbey", "pier", "zoo"]) == expected


def test_tiles_stand_in_reading_order_above_their_captions():
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    tiles = [
        pictures.tile(np.full((128, 128, 3), c, np.uint8), ["café " + "w" * 80, "b"])
        for c in colours
    ]
    size, height = pictures.TILE, tiles[0].shape[0]
    assert height > size and tiles[0][size:].max() > 200  # letters
    assert (tiles[0][size:, -3:] == 0).all()  # that end before the edge
    picture = pictures.grid(tiles, 2)
    assert picture.shape == (3, 2 * height, 2 * size)
    corners = [(0, 0), (0, size), (height, 0), (height, size)]
    seen = [tuple((255 * picture[:, r, c]).round().int().tolist()) for r, c in corners]
    assert seen == [*colours, (0, 0, 0)]
