"""Devices: the layout and number format that a network gets, and what is refused."""

import copy
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from deepvision.runtime import device
from deepvision.runtime.device import (
    DeviceContext,
    amp_problem,
    changing_shapes,
    check_size,
    choose_device,
    compile_problem,
    configure_backend,
    has_unused_parameters,
    preferred_layout,
    prepare_model,
    probe_backward,
    supports,
)
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


def test_formats_that_a_device_lacks_have_a_substitute(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    for capability, emulated in (((7, 0), True), ((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert bool(amp_problem("bf16", gpu)) == emulated
        assert amp_problem("fp16", gpu) is amp_problem("off", gpu) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert amp_problem("bf16", gpu).endswith("(Tesla V100): use --amp=fp16")
    assert amp_problem("fp16", CPU.device).endswith("use --amp=bf16")
    assert amp_problem("bf16", CPU.device) is None


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_75", "sm_80", "sm_90"], (7, 0), False),  # V100
        (["sm_75", "sm_80", "sm_90"], (6, 0), False),  # P100
        (["sm_75", "sm_80", "sm_90"], (7, 5), True),
        (["sm_75", "sm_80", "sm_90"], (8, 9), True),  # from sm_80 on
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_90a"], (12, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),
        (["sm_100", "sm_120"], (12, 0), True),
        (["gfx90a"], (9, 0), True),
        ([], (7, 0), True),
    ],
)
def test_a_gpu_needs_kernels_that_were_built_for_it(archs, capability, runs):
    assert supports(archs, capability) == runs


@pytest.fixture
def one_gpu(monkeypatch):
    """CUDA as of one H200, without the GPU."""
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_arch_list": ["sm_75", "sm_90"],
        "get_device_name": "NVIDIA H200",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    return monkeypatch


def test_a_gpu_that_pytorch_no_longer_supports_is_an_error(one_gpu):
    assert choose_device("auto") == torch.device("cuda", 0)
    one_gpu.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    with pytest.raises(UserError, match=r"not support this GPU \(.*, compute capability 7.0\): "):
        choose_device("auto")


def test_a_driver_that_is_too_old_is_an_error_and_no_driver_is_none(monkeypatch, capsys):
    text = "CUDA initialization: The NVIDIA driver on your system is too old (found 11040). Please"

    def is_available():
        warnings.warn(text, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    with pytest.raises(
        UserError, match=r"is too old \(found 11040\): update the driver, or use --g"
    ):
        choose_device("auto")
    text = "CUDA initialization: Found no NVIDIA driver on your system. Please check"
    assert choose_device("auto").type == "cpu"


def test_torchrun_gives_each_process_a_gpu(one_gpu):
    one_gpu.setenv("TORCHELASTIC_RUN_ID", "test")
    one_gpu.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="more processes than .* GPUs: use --nproc_per_node=1"):
        choose_device("auto", "--gpu")
    with pytest.raises(UserError, match="^--gpu: torchrun gives each process its own GPU"):
        choose_device("cuda:0", "--gpu")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("device", "capability", "amp", "layout"),
    [
        ("cpu", None, "off", torch.channels_last),
        ("mps", None, "off", torch.contiguous_format),
        ("cuda", (7, 0), "off", torch.contiguous_format),
        ("cuda", (7, 0), "fp16", torch.channels_last),
        ("cuda", (8, 0), "off", torch.channels_last),
    ],
)
def test_channels_last_is_used_where_it_pays(device, capability, amp, layout):
    assert preferred_layout(device, capability, amp) == layout


@pytest.mark.parametrize(("device", "expected"), [("cpu", False), ("mps", False), ("cuda", True)])
def test_only_cuda_copies_without_waiting(device, expected):
    """A tensor that records how it is copied."""

    class Recorder:
        def to(self, device, **options):
            copies.append(options["non_blocking"])

    copies = []
    DeviceContext(torch.device(device)).to_device(Recorder(), Recorder())
    assert copies == [expected] * 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"training": True}, True),
        ({"training": True, "deterministic": True}, False),
    ],
)
def test_cudnn_times_its_algorithms_in_training_only(options, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not expected)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        configure_backend(CPU.device, **options)
        assert torch.backends.cudnn.benchmark == expected
        with changing_shapes():
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_machine_without_a_compiler_says_so_in_one_line(tmp_path):
    environment = os.environ | {"CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    program = (
        "import torch; from deepvision.runtime.device import compile_problem;"
        "print(compile_problem('vit', torch.device('cpu')))"
    )
    code = Path(prepare_model.__code__.co_filename).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=code, env=environment, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"--compile does not work here \(.*ompiler.*\): leave it out", lines[-1]), (
        done
    )


def test_compile_is_refused_for_the_custom_convolution():
    assert "does not speed up CustomConv2d" in compile_problem("custom_conv", CPU.device)


def test_a_float16_attack_sees_gradients_that_float16_cannot_hold(monkeypatch):
    """A gradient of 1e-8 in the network: 0 in float16, which starts at 6e-8."""
    monkeypatch.setitem(device.AMP_DTYPES, "bf16", torch.float16)  # fp16 is refused on the CPU

    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x.mean((2, 3)))

    model, _ = prepare_model(Faint().eval(), CPU.device, "bf16")
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    exact = 1e-8 * model.fc.weight[0] / 64
    for _ in range(2):  # the hooks leave nothing on the caller's tensor
        (g,) = torch.autograd.grad(1e-8 * model(x)[:, 0].sum(), x)
        torch.testing.assert_close(g[0, :, 0, 0], exact, rtol=0.05, atol=1e-12)
    (1e-8 * model.train()(x)[:, 0].sum()).backward()  # in training, the scaler's task
    assert model.fc.weight.grad.abs().max() < 1e-8


def test_unused_parameters_are_found():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x.mean((2, 3)))

    assert has_unused_parameters(Spare(), CPU)
    assert not has_unused_parameters(nn.Sequential(nn.Conv2d(3, 4, 3)), CPU)


class Views(nn.Module):
    """Has `view` where `flatten` would do, as many answers have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=16)
        self.fc = nn.Linear(4 * 8 * 8, 5)

    def forward(self, x):
        x = self.conv(x)
        return self.fc(x.view(x.size(0), -1))


def test_a_network_that_fails_in_both_layouts_is_reported(capsys):
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("my mistake")

    prepare_model(Broken(), CPU.device)
    assert capsys.readouterr().out == "The network fails on a black image: my mistake.\n"


def test_a_network_that_needs_the_ordinary_layout_gets_it(capsys):
    model, context = prepare_model(Views(), CPU.device)
    assert "needs the contiguous layout (view size is not" in capsys.readouterr().out
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


def test_compiling_for_the_cpu_says_what_it_costs(capsys):
    prepare_model(nn.Conv2d(3, 4, 3), CPU.device)
    assert not capsys.readouterr().out
    prepare_model(nn.Conv2d(3, 4, 3), CPU.device, compiled=True)
    assert "--compile" in capsys.readouterr().out


def test_a_network_of_one_size_is_named_before_the_run_and_left_as_it_was():
    fixed = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    before = copy.deepcopy(fixed.state_dict())
    check_size(fixed, CPU, 16, "--resolution")
    with pytest.raises(UserError, match="no images of 8 pixels .*leave --resolution out"):
        check_size(fixed, CPU, 8, "--resolution")
    assert fixed.training
    assert all(torch.equal(before[name], v) for name, v in fixed.state_dict().items())
