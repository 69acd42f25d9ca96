"""grade.py: a class with every mishap, graded by the command, killed once and resumed.

Each mishap is put into a right answer, where one check meets it; the others must lose nothing.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from grader.judge import find_isolation

ROOT = Path(__file__).resolve().parents[1]
ANSWER = (ROOT / "tests" / "course" / "student_answer.py").read_text()
ANSWER = ANSWER.replace("from torchvision.utils import make_grid\n", "")  # seconds, for no check
IN_MODULE = "        self.stride, self.padding = stride, padding\n"  # of CustomConv2d.__init__
CNN_CHECK = "conv: the CNN runs on CustomConv2d"

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes in /proc"),
    pytest.mark.timeout(1200),  # CPU limits, waited for on a loaded machine
]


def with_mishap(*lines: str) -> str:
    """The answer, with these lines where a CNN's first CustomConv2d is made."""
    lines = ("if in_channels == 3:", "    import os, sys, time", *(f"    {line}" for line in lines))
    block = "".join(f"        {line}\n" for line in lines)
    assert IN_MODULE in ANSWER
    return ANSWER.replace(IN_MODULE, IN_MODULE + block)


def with_import(*lines: str, answer: str = ANSWER) -> str:
    """An answer, with these lines run at import."""
    return "\n".join([answer, "import os, shutil, sys", *lines, ""])


def mishaps(out: Path) -> dict[str, str]:
    """Submissions by the name of their mishap, which also orders them: "asleep" waits longest.

    `out` is where the marks go.
    """
    forged = f"{out}/loops/results.json", f"{out}/tampers/results.json", "results.json"
    return {
        "loops": with_mishap("while True: pass"),
        "exits at once": with_mishap("os._exit(0)"),
        "prints, deletes and exits": with_import(
            "print('x' * 10**7)",
            "os.write(2, bytes(10**7))",
            "shutil.rmtree(os.getcwd(), ignore_errors=True)",
            answer=with_mishap("sys.exit(0)"),
        ),
        "kills and forks": with_mishap(
            "try: os.killpg(os.getpgid(os.getppid()), 9)",
            "except OSError: pass",
            "try: os.kill(-1, 9)",
            "except OSError: pass",
            "while True:",
            "    try: os.fork()",
            "    except OSError: pass",
        ),
        "fills memory and disk": with_mishap(
            "hoard = []",
            "try:",
            "    while True: hoard.append(torch.ones(2**25))",
            "except RuntimeError: hoard = None",
            "while True:",
            "    open(str(time.time()), 'wb').write(bytes(2**25))",
        ),
        "asleep": with_mishap("time.sleep(1e6)"),
        "tampers": with_import(
            "import builtins, checks.grading, self_check",
            "yes = lambda *args, **kwargs: True",
            "torch.allclose = torch.isclose = torch.equal = torch.Tensor.allclose = yes",
            "checks.grading.compare = checks.grading.judge = checks.grading.expect = yes",
            "builtins.all = yes",
            "self_check.results_json = yes",
            f"for path in {forged}:",
            "    try: open(path, 'w').write('{\"score\": 100}')",
            "    except OSError: pass",
            f"copy = {str(out.parent / 'class' / 'loops.py')!r}",
            "try: exec(open(copy).read())  # another's attention, which is right",
            "except PermissionError: pass",
            answer=ANSWER.replace(".softmax(-1)", ""),
        ),
    }


def command(folder: Path, out: Path, *words: str, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "code" / "grade.py"), str(folder), "--out", str(out), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def processes(word: str) -> list[str]:
    """Command lines that hold the word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line and int(path.parent.name) != os.getpid():
            found.append(line)
    return found


def wait_for(condition, seconds: float = 300) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
    return bool(condition())


@pytest.fixture(scope="module")
def open_folder():
    """A folder that all users may read: what stops a submission must be the sandbox."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def graded(open_folder):
    """The class, graded by a command that was killed after its first marks and started again."""
    root = open_folder
    folder, out = root / "class", root / "marks"
    folder.mkdir()
    for name, source in mishaps(out).items():
        (folder / f"{name}.py").write_text(source)
    (folder / "Zoë O'Neil_123" / "hw 2" / "code").mkdir(parents=True)
    (folder / "Zoë O'Neil_123" / "hw 2" / "code" / "student_code.py").write_text(ANSWER)
    (folder / "notes.txt").write_text("no submission")
    (folder / "broken.zip").write_bytes(b"PK no zip")
    words = ["--jobs", "2", "--cpu-limit", "3", "--csv", str(root / "grades.csv")]
    first = command(folder, out, *words)
    assert wait_for(lambda: list(out.glob("*/results.json"))), first.communicate()
    first.kill()
    first.communicate()
    assert wait_for(lambda: not processes(str(out)), 60), "what it started is still running"
    before = {path: path.read_text() for path in out.glob("*/results.json")}
    second = command(folder, out, *words)
    said, errors = second.communicate()
    for path, text in before.items():  # not graded again: it holds the seconds that it took
        assert path.read_text() == text
    assert f"{len(before)} of {len(mishaps(out)) + 1} were graded before" in said, said + errors
    return out, second.returncode, said, errors


def lost(out: Path, name: str) -> set[str]:
    """The checks that a submission fails."""
    record = json.loads((out / name / "results.json").read_text())
    assert len(record["tests"]) > 20
    return {test["name"] for test in record["tests"] if test["score"] < test["max_score"]}


def test_a_right_answer_loses_nothing_to_the_others(graded):
    assert lost(graded[0], "Zoë O'Neil_123") == set()


HARMFUL = [
    "loops",
    "exits at once",
    "prints, deletes and exits",
    "kills and forks",
    "fills memory and disk",
    "asleep",
]


@pytest.mark.parametrize("name", HARMFUL)
def test_a_mishap_costs_the_check_that_meets_it_alone(graded, name):
    assert lost(graded[0], name) == {CNN_CHECK}


def test_a_wrong_answer_wins_nothing_by_changed_functions_forged_files_and_copies(graded):
    attention = {"softmax attention, head by head", "large scores, against PyTorch's own"}
    assert {f"attention: {name}" for name in attention} <= lost(graded[0], "tampers")


def test_the_table_the_csv_and_the_reports(graded):
    out, status, said, errors = graded
    assert status == 1 and "Traceback" not in errors  # one zip is refused
    assert "skipped notes.txt: neither a zip, a folder nor a .py file" in said
    rows = {row["student"]: row for row in csv.DictReader((out.parent / "grades.csv").open())}
    assert set(rows) == {*mishaps(out), "Zoë O'Neil_123", "broken"}
    assert rows["broken"]["total"] == "" and "refused: the zip is damaged" in rows["broken"]["note"]
    assert rows["Zoë O'Neil_123"]["total"] == rows["Zoë O'Neil_123"]["max_total"]
    assert rows["Zoë O'Neil_123"]["file"] == "hw 2/code/student_code.py"
    assert float(rows["loops"]["total"]) == float(rows["exits at once"]["total"])
    assert CNN_CHECK.split(": ")[1] in (out / "loops" / "report.txt").read_text()
    for name, row in rows.items():
        marks = f"{float(row['total']):g}/8" if row["total"] else "-"
        assert re.search(rf"^{re.escape(name)} +{marks} ", said, re.M)


def test_nothing_is_left_behind(graded):
    assert not processes(str(graded[0]))


def test_ctrl_c_ends_what_it_started(tmp_path):
    folder, out = tmp_path / "class", tmp_path / "marks"
    folder.mkdir()
    (folder / "sleeps.py").write_text("import time\ntime.sleep(1e6)\n")
    running = command(folder, out, "--jobs", "1")
    assert wait_for(lambda: len(processes(str(out))) > 2)  # the worker's holds it as well
    running.send_signal(signal.SIGINT)
    said, errors = running.communicate(timeout=120)
    assert running.returncode == 130 and "Traceback" not in errors
    assert errors.strip().endswith("stopped; the same command continues")
    assert wait_for(lambda: not processes(str(out)))  # a worker still imports torch, then ends


def isolates(as_user: dict) -> bool:
    """Whether another user of this machine can grade in a sandbox."""
    code = "from grader.judge import find_isolation; assert find_isolation()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT / "code", capture_output=True, **as_user
        )
    except PermissionError:
        return False
    return done.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run without root then")
def test_without_root(open_folder):
    """A user and process namespace instead of another user."""
    user, home = 54_321, open_folder / "home"
    folder, out = home / "class", home / "marks"
    as_user = {"user": user, "group": user, "extra_groups": [], "env": os.environ | {"HOME": "/"}}
    if not isolates(as_user):
        pytest.skip("here, other users can neither read Python nor make namespaces")
    folder.mkdir(parents=True)
    (folder / "right.py").write_text(ANSWER)
    harm = with_import(
        f"for path in ['{out}/right/results.json', '{folder}/right.py']:",
        "    try: open(path, 'w')",
        "    except OSError: pass",
        "children = 0",
        "try:",
        "    while children < 500:",
        "        if os.fork() == 0: os.read(os.pipe()[0], 1)",
        "        children += 1",
        "except OSError: pass",
        "os.kill(-1, 9)",
        "for _ in range(children): os.wait()",
        "assert 0 < children < 500",
    )
    (folder / "harm.py").write_text(harm)
    shutil.chown(folder, user, user)
    shutil.chown(home, user, user)
    running = command(folder, out, "--jobs", "2", **as_user)
    said, errors = running.communicate()
    assert running.returncode == 0, said + errors
    assert lost(out, "right") == lost(out, "harm") == set(), said
    assert (folder / "right.py").read_text() == ANSWER


MISTAKES = [
    ([], "name either SUBMISSIONS or --gradescope"),
    (["nowhere"], "there is no folder nowhere"),
    (["."], "there is no submission in ."),
    ([".", "--jobs", "0"], "--jobs must be at least 1"),
    ([".", "--cpu-limit", "soon"], "invalid float value"),
    (["--gradescope", "no/where.zip"], "cannot pack no/where.zip"),
]

# All command lines in one process, which imports torch once; prints [[status, error], ...] as JSON
CHILD = """
import contextlib, io, json, runpy, sys
found = []
for words in json.loads(sys.argv[1]):
    error, sys.argv[1:] = io.TextIOWrapper(io.BytesIO()), words
    with contextlib.redirect_stderr(error):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as e:  # with a status, or the line to print
            status, line = (e.code, "") if isinstance(e.code, int) else (1, f"{e.code}\\n")
            error.flush()
            found.append([status, error.buffer.getvalue().decode() + line])
print(json.dumps(found))
"""


def test_a_mistake_is_one_line(tmp_path):
    grade = str(ROOT / "code" / "grade.py")
    code = f"import sys; del sys.argv[0]; sys.path[0] = {str(ROOT / 'code')!r}{CHILD}"
    words = json.dumps([words for words, _ in MISTAKES])
    command = [sys.executable, "-c", code, grade, words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = json.loads(done.stdout)
    for (status, error), (_, problem) in zip(found, MISTAKES, strict=True):
        assert status in (1, 2) and problem in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_isolation_works_here():
    assert find_isolation() or sys.platform != "linux"
