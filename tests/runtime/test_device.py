"""Devices: the layout and number format that a network gets, and what is refused."""

import pytest
import torch
from torch import nn

from deepvision.runtime.device import DeviceContext, choose_device, prepare_model, probe_backward
from utils import UserError

CPU = DeviceContext(torch.device("cpu"))


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cuda:x", "mps"])
def test_a_device_that_is_not_there_is_refused(name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has an Apple GPU")
    with pytest.raises(UserError, match="--device"):
        choose_device(name)


def test_the_cpu_can_be_named_and_is_the_fallback(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("cpu").type == choose_device("auto").type == "cpu"
    assert capsys.readouterr().out == "No CUDA device found: running on the CPU.\n"


def test_float16_on_the_cpu_is_refused():
    with pytest.raises(UserError, match="--amp=bf16"):
        prepare_model(nn.Linear(2, 2), CPU.device, "fp16")


class Views(nn.Module):
    """Has `view` where `flatten` would do, as many answers have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=16)
        self.fc = nn.Linear(4 * 8 * 8, 5)

    def forward(self, x):
        x = self.conv(x)
        return self.fc(x.view(x.size(0), -1))


def test_a_network_that_needs_the_ordinary_layout_gets_it():
    model, context = prepare_model(Views(), CPU.device)
    assert context.memory_format == torch.contiguous_format
    x, _ = context.to_device(torch.rand(2, 3, 128, 128), torch.zeros(2))
    model(x).sum().backward()
    net, other = prepare_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), CPU.device)
    assert other.memory_format == torch.channels_last
    assert net.training and int(net[1].num_batches_tracked) == 0
    assert all(p.grad is None for p in net.parameters())


def test_no_memory_is_no_obstacle_in_the_network():
    class Large(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        probe_backward(Large(), CPU)


class MixesFormats(torch.autograd.Function):
    """A student's product, which does not think of autocast."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 7))

    def forward(self, x):
        return MixesFormats.apply(x.mean((2, 3)), self.weight)


def test_a_backward_pass_without_mixed_precision_is_refused_in_one_line():
    assert prepare_model(Student(), CPU.device)[0].weight.grad is None
    with pytest.raises(UserError, match=r"^--amp: the network's own backward .*: leave it out$"):
        prepare_model(Student(), CPU.device, "bf16")
