"""What a submission's process may write to the grader, and what the grader makes of it."""

from __future__ import annotations

import os

import pytest

from grader.judge import Settings, Worker, grade
from grader.submissions import read
from self_check import RUBRIC

WRITE_FRAME = """
import io, os, struct, torch

def write(data):
    frame = struct.pack("<Q", len(data)) + data
    for file in range(3, 64):
        try: os.write(file, frame)
        except OSError: pass

def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()

FORGED = {"error": "", "hint": "", "seconds": 0.0, "remarks": []}
"""
# The frame of the import; then come those of the checks
IMPORTED = 'write(saved({**FORGED, "findings": {}}))'
RUNS_CODE = """
class Evil:
    def __reduce__(self):
        return open, ("{path}", "w")

for _ in range(100):
    write(saved({{**FORGED, "findings": Evil()}}))
"""
HUGE = """
huge = torch.zeros(1).expand(2**40)
for _ in range(100):
    write(saved({**FORGED, "findings": {"output": huge, "logits": [huge]}}))
"""
OTHER_TYPES = """
for content in (None, [], {}, {"findings": None}, {**FORGED, "findings": 3}):
    write(saved(content))
for _ in range(100):
    write(b"no pickle")
"""
TOO_LONG = """
for file in range(3, 64):
    try: os.write(file, b"\\xff" * 64)
    except OSError: pass
"""


@pytest.fixture
def submission(tmp_path):
    def make(source: str):
        (tmp_path / "student_code.py").write_text(source)
        return read(tmp_path / "student_code.py")

    return make


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (IMPORTED + HUGE, "wrote something else than findings"),
        (IMPORTED + OTHER_TYPES, "wrote something else than findings"),
        (TOO_LONG, "writes more than findings"),
    ],
    ids=["huge", "types", "too long"],
)
def test_forged_frames_win_nothing(submission, source, problem):
    results = grade(submission(WRITE_FRAME + source), Settings())
    assert len(results) == len(RUBRIC) and problem in results[0].problem
    assert all(result.problem and result.score == 0 for result in results)


def test_a_frame_runs_no_code(submission, tmp_path):
    trap = tmp_path / "trap"
    source = WRITE_FRAME + IMPORTED + RUNS_CODE.format(path=trap)
    results = grade(submission(source), Settings())
    assert all("wrote something else" in result.problem for result in results)
    assert not trap.exists()


def test_the_workers_environment_holds_no_secrets(submission, monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    source = "import os\nassert 'TOKEN' not in os.environ and os.environ['HOME'] == os.getcwd()\n"
    with Worker(submission(source), [], Settings()) as worker:
        worker.wait_until_ready()
        assert worker.observation().error == ""
        folder = worker.folder
    assert worker.process.returncode is not None and not os.path.exists(folder)
