"""A fork server that has main.py imported, for tests that start many runs."""

import os
import signal
from multiprocessing import forkserver


def restart() -> None:
    """Replace the fork server of other tests: it has not imported main.py and blocks signals."""
    if pid := forkserver._forkserver._forkserver_pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # ensure_running reaps it
    forkserver.set_forkserver_preload(["main", "torch._dynamo"])  # as optimizers import it
    forkserver.ensure_running()
