"""What a submission's process may use: limits, another user or namespace, and Landlock.

Three layers, each used where the system has it:

1. resource limits (POSIX): CPU time, memory, processes, size of a file;
2. another user (if the grader is root), or a user and process namespace (Linux): the submission
   cannot signal the processes of others, and the limit on processes counts only its own;
3. Landlock (Linux 5.13): it writes below its own folder alone, cannot read what is hidden from it,
   and opens no TCP connection (from 6.7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

MEMORY = 2**32  # bytes beyond what the imports take
PROCESSES = 16  # and threads
FILE_SIZE = 2**26
JUDGE_MEMORY, JUDGE_CPU = 2**32, 3600
DISK, DISK_FILES = 2**28, 10_000  # of the whole folder
CPU_MARGIN = 10  # seconds; `observe` stops a probe at its limit, this stops the process
FIRST_USER = 2_100_000_000  # + process id: a user that no system has


# ---- Before the submission's process starts ---------------------------------------------------


def find_isolation(paths: Sequence[Path]) -> list[str]:
    """The first words of the command that runs a submission, the strictest that works here.

    paths: what the submission's process must be able to read.
    """
    words = ["sh", "-c", 'for path; do test -r "$path" || exit; done', "sh", *map(str, paths)]
    for prefix in _isolations():
        with contextlib.suppress(OSError):
            if subprocess.run([*prefix, *words], capture_output=True).returncode == 0:
                return prefix
    return []


def _isolations() -> Iterator[list[str]]:
    if os.geteuid() == 0:
        for user in (FIRST_USER + os.getpid(), 60_000 + os.getpid() % 5_000):
            drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
            yield [*drop, "--no-new-privs"]
            # Python may be installed where only root may read
            read = "+dac_read_search"
            yield [*drop, "--no-new-privs", f"--inh-caps={read}", f"--ambient-caps={read}"]
    namespaces = ["unshare", "--user", "--map-current-user", "--pid", "--fork", "--kill-child"]
    # the first process of a namespace ignores signals, such as the one for too much CPU time
    yield [*namespaces, "sh", "-c", '"$@"; exit $?', "sh"]


def user_of(prefix: Sequence[str]) -> int | None:
    """The user that the command changes to, if it does."""
    words = [word for word in prefix if word.startswith("--reuid=")]
    return int(words[0].partition("=")[2]) if words else None


def weaknesses(prefix: Sequence[str]) -> list[str]:
    """What a teacher should know about the isolation here."""
    found = []
    if not prefix:
        found.append("submissions can end this program and your processes: use a container")
    if not landlock_version():
        found.append("there is no Landlock: submissions can read and change files outside theirs")
    elif any(word.startswith("--ambient-caps") for word in prefix):
        found.append("only root can read this Python, so submissions can read root's files")
    return found


def kill_all(process: subprocess.Popen, user: int | None) -> None:
    """Kill a process, its group and, if it has a user to itself, all processes of that user."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if user is not None:
        words = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        subprocess.run([*words, "sh", "-c", "kill -9 -1"], capture_output=True)
    process.wait()


def exceeds_disk(folder: Path) -> bool:
    """Return True if the files below the folder are larger or more than the limits allow."""
    used = count = 0
    for parent, folders, names in os.walk(folder):
        count += len(folders) + len(names)
        for name in names:
            with contextlib.suppress(OSError):
                used += os.lstat(os.path.join(parent, name)).st_blocks * 512
        if used > DISK or count > DISK_FILES:
            return True
    return False


def when_parent_ends(pipe: int, action: Callable[[], object]) -> None:
    """Call `action` in a thread as soon as the process at the other end of the pipe has ended."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(pipe, 1):
                pass
        action()

    threading.Thread(target=wait, daemon=True).start()


def limit_judge() -> None:
    """Limit this process: what a submission reports may cost it memory and time, too."""
    _limit_memory(JUDGE_MEMORY)
    _set_limit(resource.RLIMIT_CPU, JUDGE_CPU)


# ---- In the submission's process --------------------------------------------------------------


def limit_resources(isolated: bool) -> None:
    """Limit memory, processes and files; call it after the imports, whose size varies.

    isolated: the kernel counts the processes of this submission alone, not all of its user's.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # the first to end without memory
    os.register_at_fork(after_in_child=lambda: os.nice(19))  # a fork bomb leaves time to others
    _limit_memory(MEMORY)
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_FSIZE, FILE_SIZE)
    _set_limit(resource.RLIMIT_NPROC, PROCESSES + (0 if isolated else _threads_of_user()))


def _limit_memory(size: int) -> None:
    """Let the process map so many bytes more; macOS enforces no such limit."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _set_limit(resource.RLIMIT_AS, pages * resource.getpagesize() + size)


def _threads_of_user() -> int:
    """The number of threads that this user runs; a bound for macOS, which has no /proc."""
    if not os.path.isdir("/proc/self"):
        return 1000
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid():
                count += len(os.listdir(folder / "task"))
    return count


def limit_cpu(seconds: float) -> None:
    """Let the process use so many seconds of CPU time from now on."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _set_limit(resource.RLIMIT_CPU, int(used + seconds + CPU_MARGIN), lower_hard=False)


def _set_limit(which: int, value: int, lower_hard: bool = True) -> None:
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value if lower_hard else hard))


# ---- Landlock (https://docs.kernel.org/userspace-api/landlock.html) -----------------------------

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same on all machines
PR_SET_NO_NEW_PRIVS = 38
READ_FILE, WRITE_FILE, TRUNCATE = 1 << 2, 1 << 1, 1 << 14
CHANGE_FOLDER = sum(1 << bit for bit in range(4, 13))  # make or remove an entry
TCP = 0b11  # bind, connect
SCOPE = 0b11  # abstract sockets and signals to processes outside


def landlock_version() -> int:
    """The version of Landlock's interface in this kernel; 0 without it."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, ctypes.CDLL(None).syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def confine(folder: Path, hidden: Sequence[Path]) -> bool:
    """Confine this thread and those that it starts; return False where Landlock is missing.

    folder: the only one that may be written in.
    hidden: folders and files that may not be read.
    """
    version = landlock_version()
    if not version:
        return False
    libc = ctypes.CDLL(None)
    write = WRITE_FILE | CHANGE_FOLDER | (TRUNCATE if version >= 3 else 0)
    fields = [write | READ_FILE]
    fields += [TCP] if version >= 4 else []
    fields += [SCOPE] if version >= 6 else []
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    rules = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    device = write & (WRITE_FILE | TRUNCATE)
    for path, allowed in (
        *((path, READ_FILE) for path in _around({path.resolve() for path in hidden})),
        (folder, write | READ_FILE),
        (Path(os.devnull), device | READ_FILE),
    ):
        _allow(libc, rules, path, allowed)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return libc.syscall(RESTRICT_SELF, rules, 0) == 0


def _allow(libc: ctypes.CDLL, rules: int, path: Path, allowed: int) -> None:
    with contextlib.suppress(OSError):  # a link to nothing, or a file that is gone
        file = os.open(path, os.O_PATH)
        libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", allowed, file), 0)
        os.close(file)


def _around(hidden: set[Path], folder: Path = Path("/")) -> Iterator[Path]:
    """The largest folders and files that hold nothing hidden."""
    if not any(path.is_relative_to(folder) for path in hidden):
        yield folder
    elif folder not in hidden:
        with contextlib.suppress(OSError):
            for entry in folder.iterdir():
                yield from _around(hidden, entry)
