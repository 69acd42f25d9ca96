"""checks/submission.py: what zip_submission.py packs is unpacked and imported."""

from __future__ import annotations

import pytest

from checks import submission
from checks.grading import CheckFailed, judge, observe

PACK = "import zipfile; z = zipfile.ZipFile('out.zip', 'w'); [z.write(f) for f in {}]; z.close()"
OTHER = f"open('code/student_code.py', 'w'); {PACK.format(['code/student_code.py'])}"


@pytest.fixture
def project(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "student_code.py").write_text("import beside_me")
    for name in ("beside_me.py", "net.pth", "net.pth.py"):
        (tmp_path / "code" / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("packer", "problem"),
    [
        ("pass", "made no zip file"),
        ("import sys; sys.exit('no space')", "python zip_submission.py fails: no space"),
        (PACK.format(["code/student_code.py", "code/net.pth"]), "holds models: code/net.pth"),
        (PACK.format(["code/net.pth.py"]), "out.zip holds no student_code.py"),
        (OTHER, "is another"),
        (PACK.format(["code/student_code.py"]), "No module named 'beside_me'"),
        ("open('out.zip', 'w').write('not a zip')", "out.zip is damaged"),
    ],
)
def test_a_wrong_archive_is_named(project, packer, problem):
    (project / "zip_submission.py").write_text(packer)
    with pytest.raises(CheckFailed, match=problem):
        submission.check_project(project)


def test_an_archive_that_imports_is_right(project):
    packed = ["code/student_code.py", "code/beside_me.py"]
    (project / "zip_submission.py").write_text(PACK.format(packed))
    remarks = submission.check_project(project)
    assert remarks == ["writeup/ holds neither a PDF nor a Markdown file"]


def test_a_drop_in_without_zip_submission_costs_nothing(project, monkeypatch):
    monkeypatch.setattr(submission, "__file__", str(project / "code" / "checks" / "submission.py"))
    (check,) = submission.CHECKS
    result = judge(check, observe(check, None))
    assert result.skipped and not result.problem
