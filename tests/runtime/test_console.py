"""Console lines, and streams that survive their terminal."""

import errno
import io

import pytest

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
