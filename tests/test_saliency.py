"""Saliency and Grad-CAM against their formulas and what they leave behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepvision.evaluation.saliency import grad_cam, saliency
from student_code import CustomConv2d, SimpleNet, SimpleViT


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
