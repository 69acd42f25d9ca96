"""The autograder's zip, in Gradescope's folders below a temporary root, by its two scripts."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STATUS = {"passed", "failed"}
VISIBILITY = {"hidden", "after_due_date", "after_published", "visible"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "autograder.zip"
    command = [sys.executable, "grade.py", "--gradescope", str(path)]
    subprocess.run(command, cwd=ROOT / "code", check=True, capture_output=True)
    return path


@pytest.fixture
def autograder(packed, tmp_path) -> Path:
    """Gradescope's folders: source, submission, results; setup.sh has run."""
    for name in ("source", "submission", "results"):
        (tmp_path / name).mkdir()
    with zipfile.ZipFile(packed) as archive:
        for info in archive.infolist():  # extractall forgets who may run a file
            os.chmod(archive.extract(info, tmp_path / "source"), info.external_attr >> 16)
    shutil.copy(tmp_path / "source" / "run_autograder", tmp_path)
    run(tmp_path, "source/setup.sh")
    return tmp_path


def run(root: Path, script: str) -> None:
    env = {"AUTOGRADER_ROOT": str(root), "PYTHON": sys.executable, "SKIP_INSTALL": "1"}
    done = subprocess.run(
        [root / script], cwd=root, env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def results(root: Path) -> dict:
    run(root, "run_autograder")
    assert [path.name for path in (root / "results").iterdir()] == ["results.json"]
    return json.loads((root / "results" / "results.json").read_text())


def test_the_zip_holds_two_scripts_at_its_root(packed):
    with zipfile.ZipFile(packed) as archive:
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    for name in ("setup.sh", "run_autograder"):
        assert stat.S_ISREG(modes[name]) and modes[name] & 0o111 == 0o111
    assert {"requirements.txt", "self_check.py", "checks/grading.py"} <= set(modes)
    assert "student_code.py" not in modes, "that is a solution"


def test_a_right_answer_gets_all_points(autograder):
    folder = autograder / "submission" / "hw2" / "code"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "course" / "student_answer.py", folder / "student_code.py")
    found = results(autograder)
    assert found["score"] == sum(test["max_score"] for test in found["tests"]) == 8
    assert found["output"].startswith("8 of 8; 4 points and the bonus not graded here")
    for test in found["tests"]:
        assert test["status"] in STATUS and test["visibility"] in VISIBILITY
        assert test["score"] == test["max_score"] > 0 and test["name"]


def test_a_wrong_file_gets_none_and_hears_why(autograder):
    (autograder / "submission" / "student_code.py").write_text("import nowhere\n")
    found = results(autograder)
    assert found["score"] == 0 and {test["status"] for test in found["tests"]} == {"failed"}
    assert "No module named 'nowhere'" in found["tests"][0]["output"]


def test_no_submission_is_said(autograder):
    (autograder / "submission" / "notes.txt").write_text("")
    found = results(autograder)
    assert found["score"] == 0 and found["output"] == "Not graded: it holds no student_code.py"
