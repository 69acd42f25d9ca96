"""Several processes that train or evaluate one network together, started by torchrun:

torchrun --nproc_per_node=2 main.py ../data --epochs=60

Each process takes its slice of every batch; only rank 0 prints and writes. A single process is
rank 0 of 1, and these functions cost it nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import UserError


def launch_id() -> str | None:
    """An identifier that torchrun's processes share, before and after a restart; None without."""
    if not dist.is_torchelastic_launched():
        return None
    return f"{os.environ['TORCHELASTIC_RUN_ID']}-{os.getppid()}"


def local_rank() -> int:
    """This process's number on its machine, which is the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes, if there are any.

    Raises:
        UserError: one of them ended early, or they cannot work together.
    """
    if not launch_id():
        yield
        return
    try:
        # small collectives stay on the CPU, so that they never wait for a GPU
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
        why = str(e).splitlines()[0]
        raise UserError(f"another process of this run failed or ended early ({why})") from e


def init_process_group(backend: str) -> None:
    """Initialise the process group.

    torchrun keeps its store across restarts, with the addresses of processes that have died. So
    each attempt uses its own prefix; TORCHELASTIC_RESTART_COUNT differs between nodes.
    """
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(name_attempt(store, rank, world_size), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def name_attempt(store: dist.Store, rank: int, world_size: int) -> str:
    """A name chosen by rank 0; the others accept it once rank 0 has answered them under it."""
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
        time.sleep(0.05)  # rank 0 is about to answer, or to start and choose a newer name


def is_main_process() -> bool:
    """Return True in the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_slice() -> slice:
    """This process's part of each batch."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return slice(rank, None, world_size())


def wrap_ddp(model: nn.Module, has_unused: bool = False) -> nn.Module:
    """`model` for training: each backward pass averages the gradients of all processes.

    has_unused: some parameters take no part in the output.
    Buffers stay apart until `sync_buffers`: to broadcast them in each forward pass would change
    the statistics that an earlier pass of the same step has saved for its backward pass (TRADES).
    """
    if world_size() == 1:
        return model
    options = {"broadcast_buffers": False, "find_unused_parameters": has_unused}
    return DistributedDataParallel(model, **options)


def report_to_torchrun(message: str) -> None:
    """Have torchrun print `message` at the end of its report, which would name no cause."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps(report))


@torch.no_grad()
def sync_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to all processes: running statistics depend on the images seen."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over all processes; may overwrite `x`."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_max(number: int) -> int:
    """The maximum over all processes."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def was_restarted() -> bool:
    """Return True if torchrun has restarted any of the processes."""
    return all_reduce_max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))) > 0


def broadcast_from_main(value: Callable[[], str]) -> str:
    """Call `value` in rank 0 and return its result in all processes."""
    found = [value() if is_main_process() else ""]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    return found[0]
