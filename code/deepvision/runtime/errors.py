"""From an exception to one line on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys

import torch

from deepvision.runtime import distributed
from utils import UserError

DEAD_WORKER = (
    "a process that loads images died ({}): use -j 0, or --cache=device on a GPU; "
    "Docker gives /dev/shm more with --shm-size=8g"
)
NO_MEMORY = "memory may have run out, or /dev/shm is full"


def worker_death(error: RuntimeError) -> UserError | None:
    """The UserError for torch's report of a dead worker; None for any other error."""
    text = str(error)
    if "DataLoader worker" in text and "Caught" not in text:
        return UserError(DEAD_WORKER.format(NO_MEMORY))
    if "shared memory" in text or "No space left on device" in text:
        return UserError(DEAD_WORKER.format("/dev/shm is full"))
    return None


def exit_code(error: BaseException, memory_advice: str = "use a smaller batch size") -> int:
    """Print what the user needs to know about `error` and return the exit code.

    memory_advice: what to do where the GPU's memory is too small.

    Raises:
        error: itself, where it is a bug and not a user's mistake.
    """
    if isinstance(error, KeyboardInterrupt):
        print("Stopped at once; saved files are intact.", file=sys.stderr)
        return 130
    message = explain(error, memory_advice)
    if message is None:
        raise error
    if hasattr(signal, "SIGCHLD"):  # torch raises again at each worker that ends from here on
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    print(f"error: {message}", file=sys.stderr)
    distributed.report_to_torchrun(f"error: {message}")
    return 1


def explain(error: BaseException, memory_advice: str) -> str | None:
    """One line for a user's mistake or a limit of the machine; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is too small for this: {memory_advice}"
    if isinstance(error, RuntimeError) and (death := worker_death(error)):
        return str(death)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python would fail to flush at exit
        place = error.filename or "the output"
        return f"cannot write {place}: {error.strerror}; saved files are intact"
    return None
