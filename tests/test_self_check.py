"""self_check.py: the rubric, the command, its output for people and for Gradescope."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from answers import OURS, ROOT, STUDENTS, module

import self_check
from checks.grading import Check, Result


def test_the_rubric_has_the_handouts_points():
    points = dict.fromkeys((*self_check.PARTS, "runs"), 0.0)
    for check in self_check.EVERYTHING:
        points[check.part] += 0 if check.bonus else check.points
    assert points["conv"] == points["attention"] == points["attack"] == 2
    assert points["blocks"] + points["vit"] == 2
    assert (points["runs"], points["submission"]) == (4, 0)
    assert sum(points.values()) == self_check.TOTAL
    assert sum(check.points for check in self_check.EVERYTHING if check.bonus) == 2


def result(points: float, problem: str = "", **kwargs) -> Result:
    check = Check("conv", points, "made up", None, None, bonus=kwargs.pop("bonus", False))
    return Result(check, problem, **kwargs)


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([result(8)], "8 of 8; 4 points and the bonus not graded here"),
        ([result(2), result(6, "wrong")], "2 of 8; 4 points and the bonus not graded here"),
        ([result(9.5), result(2.5, "wrong"), result(2, "wrong", bonus=True)],
         "9.5 of 12, bonus 0 of 2"),
        ([result(12), result(2, bonus=True)], "12 of 12, bonus 2 of 2"),
        ([result(6), result(2, skipped="2022")], "6 of 6; 6 points and the bonus not graded here"),
    ],
)  # fmt: skip
def test_totals(results, text):
    assert self_check.total(results) == text


def test_the_results_for_gradescope():
    wrong = result(2, "it fails", hint="do it", remarks=["so"])
    content = self_check.results_json([result(6), wrong], 1.23)
    assert (content["score"], content["execution_time"]) == (6, 1.2)
    assert sum(test["max_score"] for test in content["tests"]) == 8
    test = content["tests"][1]
    assert test.keys() == {"name", "score", "max_score", "status", "output", "visibility"}
    assert (test["name"], test["score"], test["status"]) == ("conv: made up", 0, "failed")
    assert test["output"] == "it fails\nhint: do it\nremark: so"
    json.dumps(content)


# ---- Files that nobody has worked on ------------------------------------------------------------

SKELETON = (ROOT / "tests" / "course" / "skeleton.py").read_text()


def test_the_untouched_skeleton_gets_nothing():
    results = list(self_check.check(module(SKELETON)))
    assert [r.check.name for r in results if r.score] == []
    assert sum(r.max_score for r in results) == 8


# ---- The command --------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """self_check.py and checks/ next to another answer."""
    shutil.copy(ROOT / "code" / "self_check.py", tmp_path)
    shutil.copytree(ROOT / "code" / "checks", tmp_path / "checks")
    shutil.copy(ROOT / "code" / "custom_blocks.py", tmp_path)
    return tmp_path


def command(tree: Path, source: str, *words: str) -> tuple[int, str, str]:
    (tree / "student_code.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "self_check.py", *words],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_grades_a_file_and_writes_json(tree):
    """An answer that prints, that has no ViT, and whose attack goes the wrong way."""
    wrong = OURS.replace("default_vit_model = SimpleViT", "").replace("-1.0 if self", "1.0 if self")
    wrong = wrong.replace("import torch\n", "import torch\nprint('me')\n", 1)
    words = ["--part", "attack", "--part", "vit", "--json", "results.json"]
    code, out, err = command(tree, wrong, *words)
    assert (code, err) == (1, "") and "me\n" not in out
    assert "hint: wrong sign" in out and "has no default_vit_model" in out
    total = re.search(r"^([\d.]+) of 3.25; 8.75 points and the bonus not graded", out, re.M)
    content = json.loads((tree / "results.json").read_text())
    assert content["score"] == sum(test["score"] for test in content["tests"]) == float(total[1])
    assert 0 < content["score"] < 2


def test_a_drop_in_costs_nothing_for_what_is_not_there(tree):
    """No zip_submission.py, no deepvision/: all points of what is asked for, exit status 0."""
    code, out, err = command(tree, OURS, "--part", "attention", "--part", "submission")
    assert (code, err) == (0, "")
    assert "not graded" in out and "2 of 2;" in out and "own process" in out
    code, out, err = command(tree, OURS, "--runs", ".")
    assert code == 2 and out == "" and "needs deepvision/ beside self_check.py" in err


def test_a_file_that_cannot_be_imported_is_a_line_for_each_check(tree):
    code, out, _ = command(tree, "import torch\nprint(", "--part", "vit")
    checks = sum(check.part == "vit" for check in self_check.RUBRIC)
    assert code == 1 and out.count("importing student_code.py raises SyntaxError") == checks
    assert "0 of 1.25" in out


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["--json", "nowhere/results.json"], "there is no folder"),
     (["--runs", "nowhere"], "there is no folder nowhere"),
     (["--explain", "cooking"], "no check is called 'cooking'")],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_the_work(monkeypatch, capsys, words, problem):
    monkeypatch.setattr(sys, "argv", ["self_check.py", *words])
    with pytest.raises(SystemExit) as exit_:
        self_check.main()
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and printed.out == "" and problem in printed.err


def test_every_check_is_explained_with_its_place_in_the_handout(monkeypatch, capsys):
    for check in self_check.EVERYTHING:
        monkeypatch.setattr(sys, "argv", ["self_check.py", "--explain", check.name])
        assert self_check.main() == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert f"{check.part}: {check.name}" in printed and "handout" in printed


def test_a_students_file_gets_all_points():
    assert sum(r.score for r in self_check.check(module(STUDENTS))) == 8
