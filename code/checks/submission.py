"""The submission: packed in a copy of the project, opened, unpacked and imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

from checks.grading import CPU_LIMIT, CheckFailed, expect

FOLDERS = ("code", "writeup", "results")
LEAVE = shutil.ignore_patterns(".*", "__pycache__", "data", "logs", "venv")
MODELS = (".pth", ".pt", ".pth.tar", ".ckpt")


def check_zip(code: ModuleType | None) -> list[str]:
    """Of the project that this file belongs to, whatever the answer's module."""
    return check_project(Path(__file__).resolve().parents[2])


def check_project(root: Path) -> list[str]:
    packer = root / "zip_submission.py"
    hint = "run this inside the assignment's folder, whose root holds zip_submission.py"
    expect(packer.is_file(), "there is no zip_submission.py above code/", hint)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        for name in FOLDERS:
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name, symlinks=True, ignore=LEAVE)
        shutil.copy(packer, copy)
        others = set(copy.rglob("*.zip"))
        python(copy, packer.name)
        made = sorted(set(copy.rglob("*.zip")) - others)
        expect(bool(made), "zip_submission.py made no zip file")
        return check_archive(made[0], root / "code" / "student_code.py", Path(folder) / "out")


def python(folder: Path, *words: str) -> None:
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=CPU_LIMIT)
    said = (done.stderr.strip() or done.stdout.strip() or "it says nothing").splitlines()
    expect(done.returncode == 0, f"python {' '.join(words)} fails: {said[-1]}")


def check_archive(archive: Path, answer: Path, out: Path) -> list[str]:
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
