"""Saliency and Grad-CAM against their formulas, and their side effects."""

from __future__ import annotations

import copy

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


class Residual(nn.Module):
    """Two blocks with a shortcut and a squeeze-and-excitation gate; functional nonlinearities."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.squeeze, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc, self.inplace = nn.Linear(4, 3), inplace

    def body(self, x):
        x = F.relu(self.conv1(x), inplace=self.inplace)
        y = self.norm(self.conv2(x))
        y = y * self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid()
        if self.inplace:
            y += x
            return F.relu_(y)
        return F.relu(y + x)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


@pytest.mark.parametrize("inplace", [False, True])
def test_grad_cam_of_a_residual_network_is_that_of_the_last_blocks_output(inplace):
    torch.manual_seed(0)
    model, x = Residual(inplace).eval(), torch.randn(5, 3, 8, 8)
    maps = grad_cam(model, x)
    A, label = model.body(x).detach(), model(x).argmax(1)
    cam = torch.einsum("nk,nkhw->nhw", model.fc.weight[label] / 64, A).relu()
    torch.testing.assert_close(maps, cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-30))


def test_grad_cam_is_the_same_whether_relus_work_in_place(net, x):
    other = copy.deepcopy(net)
    for module in other.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    torch.testing.assert_close(grad_cam(net, x), grad_cam(other, x))


class WithExtraConvolutions(nn.Module):
    """One convolution is called twice, one never, and the output of one is not used."""

    def __init__(self):
        super().__init__()
        self.first, self.shared = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.dropped, self.unused = nn.Conv2d(4, 9, 3), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def body(self, x):
        x = self.first(x).relu()
        return self.shared(self.shared(x).relu()).relu()

    def forward(self, x):
        x = self.body(x)
        self.dropped(x)
        return self.fc(x.mean((2, 3)))


def test_unused_and_shared_convolutions_do_no_harm():
    torch.manual_seed(0)
    model, x = WithExtraConvolutions(), torch.randn(5, 3, 8, 8)
    A, label = model.body(x).detach(), model(x).argmax(1)
    cam = torch.einsum("nk,nkhw->nhw", model.fc.weight[label], A).relu()
    expected = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(grad_cam(model, x), expected)


def test_maps_show_the_patch_that_decides():
    """Class 1 is a red patch anywhere, class 0 none: red minus a threshold, then the mean."""
    model = nn.Sequential(
        nn.Conv2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )
    model.append(nn.Flatten()).append(nn.Linear(1, 2))
    values = [[[1.0, 0, 0]], [-0.5], [[1.0]], [0.0], [[-1.0], [1.0]], [0.001, -0.001]]
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.data = torch.tensor(value).view(parameter.shape)
    x = torch.zeros(1, 3, 16, 16)
    x[0, 0, 4:8, 10:14] = 1.0
    assert model(x).argmax(1).item() == 1
    inside = torch.zeros(16, 16)
    inside[4:8, 10:14] = 1.0
    for maps in (grad_cam(model, x), saliency(model, x)[0]):
        torch.testing.assert_close(maps[0], inside)


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
