"""Run the probes on a submission, in the sandbox, and write what they find to a pipe.

    python worker.py '{"folder": ..., "checks": [...], ...}'

Each frame is 8 bytes of length and an observation, saved by torch. An empty frame comes first: the
sandbox is ready. The second is the observation of the import.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import struct
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from grader import sandbox

if TYPE_CHECKING:
    from checks.grading import Observation


def main(job: dict) -> None:
    """Observe the import, then the checks; end early if a probe left a thread or a process."""
    sandbox.when_parent_ends(job["parent"], lambda: os._exit(1))
    sandbox.confine(Path(job["folder"]), [Path(path) for path in job["hidden"]])
    import self_check  # after confine, which holds for threads that are started later
    from checks.grading import observe

    # the first optimizer would import it: seconds of a check's limit
    importlib.import_module("torch._dynamo")
    sandbox.limit_resources(job["isolated"])
    send(job["pipe"], b"")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    sys.path[0] = job["folder"]
    limit, threads = job["limit"], threading.active_count()
    sandbox.limit_cpu(limit)
    send(job["pipe"], saved(observe(self_check.IMPORT, None, limit=limit)))
    code = sys.modules.get("student_code")
    for number in job["checks"]:
        sandbox.limit_cpu(limit)
        send(job["pipe"], saved(observe(self_check.RUBRIC[number], code, limit=limit)))
        if threading.active_count() > threads or has_children():
            break


def has_children() -> bool:
    """Return True if a process that the submission forked is still running."""
    with contextlib.suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                return True
    return False


def saved(observation: Observation) -> memoryview:
    """The observation as `torch.save` writes it."""
    import torch

    file = io.BytesIO()
    torch.save(observation.as_dict(), file)
    return file.getbuffer()


def send(pipe: int, data: bytes | memoryview, process: int = os.getpid()) -> None:
    """Write a frame; a process that the submission forked writes none."""
    if os.getpid() != process:
        os._exit(0)
    for left in (memoryview(struct.pack("<Q", len(data))), memoryview(data)):
        while left:
            left = left[os.write(pipe, left) :]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    os._exit(0)
