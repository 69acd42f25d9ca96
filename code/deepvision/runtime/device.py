"""Devices: choose one, configure its backend, prepare a network for it, move batches to it."""

from __future__ import annotations

import copy
import os
import platform
import re
import sys
from dataclasses import dataclass, replace
from types import MethodType

import torch
from torch import Tensor, nn

from deepvision.runtime import distributed, memory
from utils import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, flag: str = "--device") -> torch.device:
    """The device called `name`: auto, cpu, mps, cuda or cuda:N.

    auto is the GPU of this process's local rank, or the CPU, with a message, if there is none.

    Raises:
        UserError: the name is none of these, or this machine has no such device.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"{flag} {name}: expected auto, cpu, mps, cuda or cuda:N")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"{flag}: PyTorch finds no Apple GPU here")
    if name in ("cpu", "mps"):
        return torch.device(name)
    if not torch.cuda.is_available():
        if name != "auto":
            raise UserError(f"{flag}: PyTorch finds no CUDA GPU here; --gpu=-1 is the CPU")
        print("No CUDA device found: running on the CPU.")
        return torch.device("cpu")
    index = torch.device(name).index if ":" in name else distributed.local_rank()
    if index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"{flag}: GPU {index} does not exist; this machine has GPUs 0 to {last}")
    return torch.device("cuda", index)


def configure_backend(device: torch.device, deterministic: bool = False) -> None:
    """Set the process-wide state of PyTorch and the C library for training on `device`.

    CUDA: the current device (NCCL takes it), TF32 in matrix products (convolutions have it by
    default). CPU: freed memory is retained. deterministic: the same bits from every run on the
    same GPU; some operations are slower.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        memory.retain_freed_memory()
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required by cuBLAS (NVIDIA's manual)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


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
        x = x.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return x, y.to(self.device, non_blocking=True)

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
        UserError: the format is not usable here, or the network's backward pass mixes formats.
    """
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp=fp16 takes a CPU twenty times as long: use --amp=bf16")
    context = DeviceContext(device, AMP_DTYPES[amp])
    model.to(device, memory_format=context.memory_format)
    if probe_backward(model, context):  # a student's convolution may call view
        context = replace(context, memory_format=torch.contiguous_format)
        model.to(memory_format=context.memory_format)
    if context.amp:
        forward = torch.autocast(device.type, context.amp)(type(model).forward)
        model.forward = MethodType(forward, model)  # deepcopy binds it to the copy
        model.register_forward_hook(lambda module, inputs, logits: logits.float())
        if reason := probe_backward(model, context):
            raise UserError(
                f"--amp: the network's own backward pass mixes formats ({reason}): leave it out"
            )
    if compiled:
        model.compile()
    return model, context


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


def device_name(device: torch.device) -> str:
    """The name for records: the GPU's model, or the CPU's architecture and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}), threads: {torch.get_num_threads()}"
