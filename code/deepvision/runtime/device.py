"""Devices: choose one, configure its backend, prepare a network for it, move batches to it."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MethodType

import torch
from torch import Tensor, nn

from deepvision.runtime import distributed, memory
from deepvision.runtime.image_conv import speed_up_image_gradient
from deepvision.runtime.matmul import configure_matmul
from utils import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: int | str | None, flag: str = "--device") -> torch.device:
    """The device called `name`: auto, cpu, mps, cuda, cuda:N; the index of a GPU, or -1, the CPU.

    auto, or None, is the GPU of this process's local rank, or the CPU, with a message, if there is
    none.

    Raises:
        UserError: the name is none of these, or this machine has no such device.
    """
    if isinstance(name, int):
        name = "cpu" if name == -1 else f"cuda:{name}"
    name = name or "auto"
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"{flag} {name}: expected auto, cpu, mps, cuda or cuda:N")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"{flag}: PyTorch finds no Apple GPU here")
    if name in ("cpu", "mps"):
        return torch.device(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        if fault := driver_fault([str(warning.message) for warning in caught]):
            raise UserError(f"{flag}: {fault}: update the driver, or use --gpu=-1, the CPU")
        if name != "auto":
            raise UserError(f"{flag}: PyTorch finds no CUDA GPU here; --gpu=-1 is the CPU")
        print("No CUDA device found: running on the CPU.")
        return torch.device("cpu")
    index = gpu_index(name, flag)
    capability = torch.cuda.get_device_capability(index)
    if not supports(torch.cuda.get_arch_list(), capability):
        version = ".".join(map(str, capability))
        gpu = f"{torch.cuda.get_device_name(index)}, compute capability {version}"
        raise UserError(
            f"{flag}: PyTorch {torch.__version__} does not support this GPU ({gpu}): "
            "install a version that does, or use --gpu=-1, the CPU"
        )
    return torch.device("cuda", index)


def gpu_index(name: str, flag: str) -> int:
    """The index of the GPU called `name`, or of this process's own under torchrun.

    Raises:
        UserError: there is no such GPU, or all processes of torchrun would share one.
    """
    count = torch.cuda.device_count()
    if distributed.launch_id():
        if ":" in name:
            raise UserError(f"{flag}: torchrun gives each process its own GPU: leave it out")
        if distributed.local_rank() >= count:
            raise UserError(
                f"torchrun started more processes than this machine has GPUs: "
                f"use --nproc_per_node={count}, or --gpu=-1"
            )
    index = torch.device(name).index if ":" in name else distributed.local_rank()
    if index >= count:
        raise UserError(
            f"{flag}: GPU {index} does not exist; this machine has GPUs 0 to {count - 1}"
        )
    return index


def driver_fault(messages: list[str]) -> str | None:
    """Why CUDA cannot start although there is a GPU, from PyTorch's warnings; None without one."""
    absent = ("no NVIDIA driver", "no CUDA-capable device")
    for message in messages:
        if "CUDA initialization" in message and not any(text in message for text in absent):
            return message.removeprefix("CUDA initialization: ").split(". ")[0].splitlines()[0]
    return None


def supports(archs: list[str], capability: tuple[int, int]) -> bool:
    """Return True if kernels for one of `archs` run on a GPU of this compute capability.

    Machine code (sm_75) runs on its major version from its minor one on, intermediate code
    (compute_75) on every later GPU (CUDA C++ Programming Guide, section 3.1). Architectures that
    are not NVIDIA's, or none, say nothing.
    """
    known = [m for m in (re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", a) for a in archs) if m]
    built = [(kind, (int(major), int(minor))) for kind, major, minor in (m.groups() for m in known)]
    return not built or any(
        version <= capability and (kind == "compute" or version[0] == capability[0])
        for kind, version in built
    )


def configure_backend(
    device: torch.device,
    deterministic: bool = False,
    training: bool = False,
    matmul: str | None = None,
) -> None:
    """Set the process-wide state of PyTorch and the C library for training on `device`.

    CUDA: the current device (NCCL takes it), TF32 in matrix products (convolutions have it by
    default). CPU: freed memory is retained; oneDNN's matrix products where they are right.
    deterministic: the same bits from every run on the same GPU; some operations are slower.
    training: cuDNN times its algorithms for each shape of a batch and takes the fastest, which may
    differ between runs. matmul: the `float32_matmul` that a resumed run has recorded.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        memory.retain_freed_memory()
        configure_matmul(matmul)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required by cuBLAS (NVIDIA's manual)
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = training and not deterministic


@contextlib.contextmanager
def changing_shapes() -> Iterator[None]:
    """Have cuDNN choose its algorithms without timing them: each new shape would be timed."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class DeviceContext:
    """A device, with the number format and memory layout that networks use on it.

    amp: the dtype of torch.autocast; None keeps float32.
    """

    device: torch.device
    amp: torch.dtype | None = None
    memory_format: torch.memory_format = torch.channels_last

    def to_device(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) in this memory format, and labels (N,)."""
        on_cuda = self.device.type == "cuda"  # elsewhere (MPS) such a copy may be read too early
        x = x.to(self.device, non_blocking=on_cuda, memory_format=self.memory_format)
        return x, y.to(self.device, non_blocking=on_cuda)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, which keeps small gradients above zero in float16; off in other formats."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)

    def peak_memory(self) -> int | None:
        """Peak memory of this process in bytes: of the GPU, or resident; None where unknown."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if resource is None:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def prepare_model(
    model: nn.Module, device: torch.device, amp: str = "off", compiled: bool = False
) -> tuple[nn.Module, DeviceContext]:
    """`model` itself on `device`, in the fastest memory layout that it can use.

    amp: off, bf16 or fp16. Parameters, their names and the logits stay float32.

    Raises:
        UserError: the network's backward pass mixes formats.
    """
    layout = preferred_layout(device.type, capability_of(device), amp)
    context = DeviceContext(device, AMP_DTYPES[amp], layout)
    model.to(device, memory_format=layout)
    if device.type == "cpu":
        speed_up_image_gradient(model)
    if layout == torch.channels_last and (reason := probe_backward(model, context)):
        context = replace(context, memory_format=torch.contiguous_format)
        model.to(memory_format=context.memory_format)
        if other := probe_backward(model, context):
            print(f"The network fails on a black image: {other}.")
        else:  # a student's convolution may call view
            print(f"The network needs the contiguous layout ({reason}).")
    if context.amp:
        forward = torch.autocast(device.type, context.amp)(type(model).forward)
        model.forward = MethodType(forward, model)  # deepcopy binds it to the copy
        model.register_forward_hook(lambda module, inputs, logits: logits.float())
        if context.amp == torch.float16:
            model.register_forward_pre_hook(_unscale_gradient)
            model.register_forward_hook(_scale_gradient)
        if reason := probe_backward(model, context):
            raise UserError(
                f"--amp: the network's own backward pass mixes formats ({reason}): leave it out"
            )
    if compiled:
        if device.type == "cpu":
            print("--compile on the CPU: minutes to start, then SimpleNet is half as fast.")
        model.compile()
    return model, context


def preferred_layout(
    device: str, capability: tuple[int, int] | None, amp: str
) -> torch.memory_format:
    """The fastest memory layout on a type of device: channels_last, except where it does not pay.

    On Apple's GPU its batch normalisation has wrong gradients (pytorch#175189); NVIDIA's GPUs
    before Ampere have no tensor cores for float32, and their kernels are faster without it.
    """
    if device == "mps" or device == "cuda" and amp == "off" and capability < (8, 0):
        return torch.contiguous_format
    return torch.channels_last


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU; None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def amp_problem(amp: str, device: torch.device) -> str | None:
    """Why a format is of no use on a device, and what to use; None if it is."""
    if amp == "fp16" and device.type == "cpu":
        return "--amp=fp16 takes a CPU twenty times as long: use --amp=bf16"
    if amp == "bf16" and device.type == "cuda" and capability_of(device) < (8, 0):
        gpu = torch.cuda.get_device_name(device)
        return f"--amp=bf16 is only emulated on this GPU ({gpu}): use --amp=fp16"
    return None


def compile_problem(kind: str, device: torch.device) -> str | None:
    """Why torch.compile is of no use for a kind of network on a device; None if it is."""
    if kind == "custom_conv":
        return (
            "--compile does not speed up CustomConv2d, whose loop it cannot compile: leave it out"
        )
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as e:  # a compiler, its headers or Triton is missing; each fails its own way
        reason = next((line for line in str(e).splitlines() if "raised:" not in line), "")
        return f"--compile does not work here ({reason}): leave it out"
    return None


GRADIENT_SCALE = 2.0**10  # a power of 2: exact


def _unscale_gradient(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    """With `_scale_gradient`: an attack's gradient passes through float16 `GRADIENT_SCALE` times
    as large, where it would often be 0. Training has its own scale (`grad_scaler`)."""
    if module.training or not inputs[0].requires_grad:
        return None
    x = inputs[0].view_as(inputs[0])  # a hook on the caller's tensor would stay there
    x.register_hook(lambda g: g / GRADIENT_SCALE)
    return (x,)


def _scale_gradient(module: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
    if not module.training and inputs[0].requires_grad:
        logits.register_hook(lambda g: g * GRADIENT_SCALE)


def has_unused_parameters(model: nn.Module, context: DeviceContext) -> bool:
    """Return True if a parameter takes no part in the logits."""
    trial = copy.deepcopy(model).eval()
    x, _ = context.to_device(torch.zeros(1, 3, 128, 128), torch.zeros(1))
    trial(x).sum().backward()
    return any(p.grad is None for p in trial.parameters() if p.requires_grad)


def probe_backward(model: nn.Module, context: DeviceContext) -> str | None:
    """The reason why forward and backward fail on an image in this context; None if they work."""
    x, _ = context.to_device(torch.zeros(1, 3, 128, 128), torch.zeros(1))
    trial = copy.deepcopy(model).eval()
    try:
        trial(x.requires_grad_(True)).sum().backward()
    except torch.OutOfMemoryError:  # not a matter of the layout
        raise
    except RuntimeError as e:
        return str(e).splitlines()[0]
    return None


@torch.inference_mode()
def check_size(model: nn.Module, context: DeviceContext, size: int, flag: str) -> None:
    """Raise UserError, which names `flag`, if the network fails on images of `size` pixels."""
    x, _ = context.to_device(torch.zeros(1, 3, size, size), torch.zeros(1))
    training = model.training
    try:
        model.eval().forward(x)  # not compiled, which would take a minute
    except (ValueError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"the network takes no images of {size} pixels ({reason}): leave {flag} out"
        ) from None
    finally:
        model.train(training)


def device_name(device: torch.device) -> str:
    """The name for records: the GPU's model, or the CPU's architecture and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}), threads: {torch.get_num_threads()}"
