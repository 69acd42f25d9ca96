"""Grade one submission: observe it in sandboxes, judge what they report in this process.

    python judge.py '{"source": ..., "out": ..., ...}'

This process never imports the submission. The frames that a worker writes are read with
`torch.load(weights_only=True)`, and their size is limited.
"""

from __future__ import annotations

import io
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from checks.grading import CPU_LIMIT, WALL_FACTOR, Observation, Result, judge
from grader import sandbox
from grader.records import write_record
from grader.submissions import CODE, Submission, read
from self_check import RUBRIC
from utils import UserError

MAX_FRAME = 2**29  # bytes of an observation: the gradients of a network of 33 million parameters
START_LIMIT = 600.0  # seconds until a worker has imported torch, on a machine under full load
PREFIX = "grade-worker-"  # of the temporary folders
NEEDED = {"checks", "grader", "self_check.py"}  # what a worker reads of this project


@dataclass(frozen=True)
class Settings:
    """How to run submissions."""

    limit: float = CPU_LIMIT  # seconds of CPU time for a check
    hidden: Sequence[Path] = ()  # what a submission may not read


class Died(Exception):
    """The worker ended, or was ended, before it wrote a whole frame."""


class Worker:
    """A process in the sandbox that observes some checks; a context manager."""

    def __init__(self, submission: Submission, checks: Sequence[int], settings: Settings) -> None:
        self.settings, self.data = settings, bytearray()
        self.temporary = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        self.folder = Path(self.temporary.name)
        submission.write(self.folder)
        prefix = find_isolation()
        self.user = sandbox.user_of(prefix)
        if self.user is not None:
            _give_away(self.folder, self.user)
        self.pipe, write_end = os.pipe()
        read_end, self.lifeline = os.pipe()
        job = {
            "folder": str(self.folder),
            "checks": list(checks),
            "limit": settings.limit,
            "hidden": [str(path) for path in (*settings.hidden, *_hidden(self.folder))],
            "isolated": bool(prefix),
            "pipe": write_end,
            "parent": read_end,
        }
        self.process = self._start(prefix, job)
        os.close(write_end)
        os.close(read_end)

    def _start(self, prefix: Sequence[str], job: dict) -> subprocess.Popen:
        worker = str(CODE / "grader" / "worker.py")
        return subprocess.Popen(
            [*prefix, sys.executable, "-B", worker, json.dumps(job)],
            cwd=self.folder,
            env=_environment(self.folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(job["pipe"], job["parent"]),
            start_new_session=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        sandbox.kill_all(self.process, self.user)
        self.process.stderr.close()
        os.close(self.pipe)
        os.close(self.lifeline)
        self.temporary.cleanup()

    def wait_until_ready(self) -> None:
        """Wait for the first frame.

        Raises:
            UserError: the sandbox does not start, which is not the submission's fault.
        """
        try:
            self.receive(START_LIMIT)
        except Died as e:
            sandbox.kill_all(self.process, self.user)
            lines = self.process.stderr.read().decode(errors="replace").strip().splitlines()
            raise UserError(f"the sandbox does not start: {[str(e), *lines][-1]}") from None

    def observation(self) -> Observation:
        """The next observation; one with an error if the worker dies or writes anything else."""
        frame = self.receive(WALL_FACTOR * self.settings.limit + sandbox.CPU_MARGIN)
        try:
            saved = torch.load(io.BytesIO(frame), map_location="cpu", weights_only=True)
            return Observation.from_dict(saved)
        except Exception:  # pickle, torch and zipfile raise nearly all there are
            return Observation(error="the submission's process wrote something else than findings")

    def receive(self, seconds: float) -> bytes:
        """Read a frame, for so many seconds of wall-clock time at most.

        Raises:
            Died: there is none, because of the time, the disk, or the end of the process.
        """
        end = time.monotonic() + seconds
        while (frame := self._frame()) is None:
            ended = self.process.poll() is not None  # first: then all that it wrote can be read
            ready = select.select([self.pipe], [], [], 0.0 if ended else 0.2)[0]
            chunk = os.read(self.pipe, 2**20) if ready else b""
            self.data += chunk
            if ended and not chunk:
                raise Died(_reason(self.process.returncode))
            if not chunk and sandbox.exceeds_disk(self.folder):
                raise Died(f"writes more than {sandbox.DISK >> 20} MB to the disk")
            if time.monotonic() > end:
                raise Died(f"not done after {seconds:g} s")
            if ready and not chunk:  # it closed the pipe; it may be about to end
                time.sleep(0.2)
        return frame

    def _frame(self) -> bytes | None:
        if len(self.data) < 8:
            return None
        (size,) = struct.unpack("<Q", self.data[:8])
        if size > MAX_FRAME:
            raise Died("writes more than findings")
        if len(self.data) < 8 + size:
            return None
        frame = bytes(self.data[8 : 8 + size])
        del self.data[: 8 + size]
        return frame


def find_isolation() -> list[str]:
    """The command prefix for a worker: it must be able to read Python, torch and the checks."""
    paths = [*sys.path, sys.executable, torch.__file__, __file__, tempfile.gettempdir()]
    return sandbox.find_isolation([Path(path) for path in paths if os.path.exists(path)])


def _hidden(folder: Path) -> list[Path]:
    """What no submission may read: the solution in this project, and other workers' folders."""
    project = [path for path in CODE.iterdir() if path.name not in NEEDED]
    return [
        *(path for path in project if not Path(sys.prefix).is_relative_to(path)),
        *folder.parent.glob(PREFIX + "*"),
    ]


def _give_away(folder: Path, user: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user)


def _environment(folder: Path) -> dict[str, str]:
    """No secrets of the teacher's, one thread, no GPU."""
    kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
    threads = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return (
        {name: os.environ[name] for name in kept if name in os.environ}
        | dict.fromkeys(threads, "1")
        | dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR"), str(folder))
        | {"CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
    )


def _reason(status: int) -> str:
    if status > 128:  # of the shell in between
        status = 128 - status
    if -status in (signal.SIGXCPU, signal.SIGKILL):
        return "its process was killed: too much CPU time or memory"
    if status < 0:
        return f"its process crashed ({signal.Signals(-status).name})"
    return f"its process ended (exit status {status})"


def observe_all(submission: Submission, settings: Settings) -> list[Observation]:
    """Observe every check of the rubric; after a worker that died, the rest runs in a new one."""
    found: list[Observation] = []
    while len(found) < len(RUBRIC):
        todo = range(len(found), len(RUBRIC))
        with Worker(submission, todo, settings) as worker:
            worker.wait_until_ready()
            try:
                imported = worker.observation()
            except Died as e:
                imported = Observation(error=f"fails: {e}")
            if imported.error:
                text = f"importing student_code.py {imported.error}"
                return found + [Observation(error=text, hint=imported.hint)] * len(todo)
            found += _collect(worker, len(todo))
    return found


def _collect(worker: Worker, count: int) -> list[Observation]:
    """The observations of `count` checks; fewer if the worker dies, the last with its reason.

    A worker that exits with status 0 between two checks is no error: the rest needs a new one.
    """
    found: list[Observation] = []
    try:
        for _ in range(count):
            found.append(worker.observation())
    except Died as e:
        if not (found and worker.process.returncode == 0):
            found.append(Observation(error=str(e)))
    return found


def grade(submission: Submission, settings: Settings) -> list[Result]:
    """Observe and judge a submission."""
    observations = observe_all(submission, settings)
    return [judge(check, found) for check, found in zip(RUBRIC, observations, strict=True)]


def stop(*_: object) -> None:
    """Handle SIGTERM: end the worker, remove its folder."""
    sys.exit("stopped")


def main(job: dict) -> None:
    """Grade the submission `job["source"]` and write its record into the folder `job["out"]`."""
    signal.signal(signal.SIGTERM, stop)
    sandbox.when_parent_ends(sys.stdin.fileno(), lambda: os.kill(os.getpid(), signal.SIGTERM))
    sandbox.limit_judge()
    start, submission = time.monotonic(), read(Path(job["source"]))
    settings = Settings(job["limit"], [Path(path) for path in job["hidden"]])
    results = grade(submission, settings)
    write_record(Path(job["out"]), submission, results, settings.limit, time.monotonic() - start)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except UserError as e:
        sys.exit(str(e))
