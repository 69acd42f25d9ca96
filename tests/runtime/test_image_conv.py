"""Strided convolutions of images are nn.Conv2d's, with a faster gradient of the image."""

import copy

import pytest
import torch
from torch import nn

from deepvision.models.registry import create_model
from deepvision.runtime.image_conv import ImageConv2d, speed_up_image_gradient


@pytest.mark.parametrize("size", [(13, 16), (9, 10), (8, 7)])
@pytest.mark.parametrize(
    "K, S, P", [(7, 2, 3), (3, 2, 1), (3, 2, 0), (4, 4, 0), (2, 3, 2), (5, 3, 0)]
)
def test_outputs_and_gradients_are_those_of_nn_conv2d(K, S, P, size):
    plain = nn.Conv2d(3, 4, K, S, P).double()
    fast = nn.Sequential(copy.deepcopy(plain))
    speed_up_image_gradient(fast)
    assert type(fast[0]) is ImageConv2d
    assert list(fast[0].state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.double, requires_grad=True)
    ys = plain(x), fast(x)
    torch.testing.assert_close(*ys)
    assert torch.equal(fast(x.detach()), ys[0])
    grads = [
        torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
        for y, module in zip(ys, (plain, fast), strict=True)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 1},
        {"stride": (2, 1)},
        {"stride": 2, "padding": "valid"},
        {"stride": 2, "padding": (1, 0)},
        {"stride": 2, "padding_mode": "reflect", "padding": 1},
        {"stride": 2, "dilation": 2},
        {"stride": 2, "groups": 3},
    ],
)
def test_other_convolutions_stay_as_they_are(options):
    conv = nn.Conv2d(3, 6, 3, **options)
    speed_up_image_gradient(conv)
    assert type(conv) is nn.Conv2d


@pytest.mark.parametrize("kind", ["torch_conv", "resnet18", "scene_net"])
def test_the_first_layer_of_our_networks_is_one(kind):
    model = create_model(kind, 5)
    speed_up_image_gradient(model)
    assert sum(isinstance(m, ImageConv2d) for m in model.modules()) == 1
