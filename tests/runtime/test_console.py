"""Console lines, and streams that survive their terminal."""

import errno
import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main
from deepvision.runtime.console import SafeStream, final_line
from deepvision.runtime.meters import Metrics


class Terminal(io.StringIO):
    """Fails from its second line on."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        if self.getvalue():
            raise OSError(self.error, "gone")
        return super().write(text)


def test_output_is_dropped_once_the_terminal_is_gone():
    stream = SafeStream(terminal := Terminal(errno.EIO))
    for line in ("one\n", "two\n", "three\n"):
        print(line, end="", file=stream, flush=True)
    assert terminal.getvalue() == "one\n"


def test_other_errors_are_raised():
    stream = SafeStream(Terminal(errno.ENOSPC))
    stream.write("one\n")
    with pytest.raises(OSError, match="gone"):
        stream.write("two\n")


def test_the_line_that_scripts_grep_for():
    assert final_line(Metrics(1.0, 52.24, 81.72)) == "******Acc@1 52.240 Acc@5 81.720"


CODE = Path(main.__file__).parent
SCRIPTS = [
    str(path.relative_to(CODE))
    for path in sorted([*CODE.glob("*.py"), *CODE.glob("reverse_attack/*.py")])
    if '\nif __name__ == "__main__":' in path.read_text()
]


@pytest.mark.skipif(sys.platform != "linux", reason="sees in /proc what a process has loaded")
@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_the_imports_has_no_traceback(script):
    """Some libraries swallow a KeyboardInterrupt there, or turn it into another error."""
    assert len(SCRIPTS) > 10
    command = [sys.executable, script, "nothing"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=CODE, **pipes)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")
