"""Several processes that train or look at one network together, as torchrun starts them:

torchrun --nproc_per_node=2 main.py ../data --epochs=60

Each takes its share of every batch; rank 0 alone prints and writes. A process by itself is rank 0
of 1, and nothing here costs it anything.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import UserError


def launch() -> str | None:
    """What torchrun's processes have in common, before and after it restarts them."""
    if not dist.is_torchelastic_launched():
        return None
    return f"{os.environ['TORCHELASTIC_RUN_ID']}-{os.getppid()}"


def restarted() -> bool:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def local_rank() -> int:
    """The number among this machine's processes, and so of the GPU to take."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Meet the other processes, if there are any.

    Raises:
        UserError: one of them ended before its time.
    """
    if not launch():
        yield
        return
    try:
        # what the processes agree on stays on the CPU, so that no GPU has to wait for it
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(sys.stdout if leads() else nowhere),
        ):
            yield
        dist.destroy_process_group()
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e).lower():
            raise
        raise UserError("another process of this run ended before its time") from None


def leads() -> bool:
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share() -> slice:
    """This process's part of each batch."""
    return slice(dist.get_rank(), None, size()) if dist.is_initialized() else slice(0, None, 1)


def replicated(model: nn.Module) -> nn.Module:
    """`model`, to train with: each backward pass averages the gradients of all processes."""
    if size() == 1:
        return model
    return DistributedDataParallel(model)


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Give all processes rank 0's buffers: running statistics follow the images each has seen."""
    if size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def total(x: Tensor) -> Tensor:
    """The sum over all processes; may overwrite `x`."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def most(number: int) -> int:
    """The largest of all processes' numbers."""
    if size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
