"""The submission: packed in a copy of the project, opened, unpacked and imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

from checks.grading import (
    CPU_LIMIT,
    Check,
    CheckFailed,
    Findings,
    NotGraded,
    attempt,
    expect,
    value,
)

FOLDERS = ("code", "writeup", "results")
LEAVE = shutil.ignore_patterns(".*", "__pycache__", "data", "logs", "venv")
MODELS = (".pth", ".pt", ".pth.tar", ".ckpt")


def project(seed: int) -> Path:
    """The project that this file belongs to."""
    return Path(__file__).resolve().parents[2]


def probe_zip(code: ModuleType | None, root: Path) -> Findings:
    """Check the project at `root`; the answer's module is not used."""
    if not (root / "zip_submission.py").is_file():
        return {"missing": True}
    return {"remarks": attempt(check_project, root)}


def judge_zip(root: Path, findings: Findings) -> list[str]:
    """The remarks; there is nothing to compare."""
    if "missing" in findings:
        raise NotGraded("there is no zip_submission.py above code/")
    return value(findings["remarks"])


def check_project(root: Path) -> list[str]:
    """Run the project's zip_submission.py in a copy, and check what it packs.

    Raises:
        CheckFailed: what is wrong with the archive.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        for name in FOLDERS:
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name, symlinks=True, ignore=LEAVE)
        copy.mkdir(exist_ok=True)
        shutil.copy(root / "zip_submission.py", copy)
        others = set(copy.rglob("*.zip"))
        python(copy, "zip_submission.py")
        made = sorted(set(copy.rglob("*.zip")) - others)
        expect(bool(made), "zip_submission.py made no zip file")
        return check_archive(made[0], root / "code" / "student_code.py", Path(folder) / "out")


def python(folder: Path, *words: str) -> None:
    """Run Python in a folder."""
    command = [sys.executable, *words]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=4 * CPU_LIMIT
    )
    last = (done.stderr.strip() or done.stdout.strip() or "it prints nothing").splitlines()[-1]
    expect(done.returncode == 0, f"python {' '.join(words)} fails: {last}")


def check_archive(archive: Path, answer: Path, out: Path) -> list[str]:
    """The archive holds the answer, which imports from what is in it, and no models."""
    try:
        with zipfile.ZipFile(archive) as file:
            names = file.namelist()
            file.extractall(out)
    except zipfile.BadZipFile as e:
        raise CheckFailed(f"{archive.name} is damaged: {e}") from None
    models = [name for name in names if name.lower().endswith(MODELS)]
    expect(not models, f"{archive.name} holds models: {', '.join(models)}", "leave them out")
    packed = sorted(out.rglob("student_code.py"))
    expect(bool(packed), f"{archive.name} holds no student_code.py")
    same = packed[0].read_bytes() == answer.read_bytes()
    expect(same, f"the student_code.py in {archive.name} is another than {answer.name} here")
    python(packed[0].parent, "-c", "import student_code")
    written = any("writeup" in name and name.endswith((".pdf", ".md")) for name in names)
    return [] if written else ["writeup/ holds neither a PDF nor a Markdown file"]


CHECKS = (
    Check(
        "submission",
        0.0,
        "zip, unpack, import",
        probe_zip,
        judge_zip,
        "zip_submission.py in a copy of the project: what it packs imports, and holds no models "
        "(handout: submission; no points)",
        project,
    ),
)
