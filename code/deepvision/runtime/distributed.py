"""Several processes that train or look at one network together, as torchrun starts them:

torchrun --nproc_per_node=2 main.py ../data --epochs=60

Each takes its share of every batch; rank 0 alone prints and writes. A process by itself is rank 0
of 1, and nothing here costs it anything.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import UserError


def launch_id() -> str | None:
    """What torchrun's processes have in common, before and after it restarts them."""
    if not dist.is_torchelastic_launched():
        return None
    return f"{os.environ['TORCHELASTIC_RUN_ID']}-{os.getppid()}"


def local_rank() -> int:
    """The number among this machine's processes, and so of the GPU to take."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Meet the other processes, if there are any.

    Raises:
        UserError: one of them ended before its time.
    """
    if not launch_id():
        yield
        return
    try:
        # what the processes agree on stays on the CPU, so that no GPU has to wait for it
        init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(sys.stdout if is_main_process() else nowhere),
        ):
            yield
        dist.destroy_process_group()
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e).lower():
            raise
        raise UserError("another process of this run ended before its time") from None


def init_process_group(backend: str) -> None:
    """Let each process know of all others.

    torchrun keeps its store over restarts, with the addresses of processes that are dead by then.
    So each attempt writes under a name of its own.
    """
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(name_attempt(store, rank, world_size), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def name_attempt(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that rank 0 makes up; the others take it once rank 0 has answered them under it."""
    me = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", me)
        for other in range(1, world_size):
            store.set(f"{me}/{store.get(f'{me}/{other}').decode()}", "welcome")
        return me
    while True:
        name = store.get("attempt").decode()
        store.set(f"{name}/{rank}", me)
        if store.check([f"{name}/{me}"]):
            return name
        time.sleep(0.05)  # rank 0 is about to answer, or to begin and make up a newer name


def is_main_process() -> bool:
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_slice() -> slice:
    """This process's part of each batch."""
    return (
        slice(dist.get_rank(), None, world_size()) if dist.is_initialized() else slice(0, None, 1)
    )


def wrap_ddp(model: nn.Module) -> nn.Module:
    """`model`, to train with: each backward pass averages the gradients of all processes."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model)


@torch.no_grad()
def sync_buffers(model: nn.Module) -> None:
    """Give all processes rank 0's buffers: running statistics follow the images each has seen."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over all processes; may overwrite `x`."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_max(number: int) -> int:
    """The largest of all processes' numbers."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def was_restarted() -> bool:
    """Whether torchrun has started any of the processes again."""
    return all_reduce_max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))) > 0


def broadcast_from_main(value: Callable[[], str]) -> str:
    """What rank 0 finds, for all processes."""
    found = [value() if is_main_process() else ""]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    return found[0]
