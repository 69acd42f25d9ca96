"""The autograder for Gradescope: packed by grade.py, run there by run_autograder.

python gradescope.py /autograder        # submission/ is graded into results/results.json
"""

from __future__ import annotations

import json
import os
import sys
import time
import zipfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from grader import sandbox
from grader.judge import Settings, grade
from grader.records import make_record, write_atomically
from grader.submissions import CODE, read
from utils import UserError

SCRIPTS = ("setup.sh", "run_autograder")
MODULES = ("self_check.py", "utils.py", "custom_*.py", "checks/**/*.py", "grader/**/*.py")


def pack(target: Path) -> None:
    """Write the zip: the two scripts at its root, and all that they need.

    Raises:
        UserError: requirements.txt is missing, or the zip cannot be written.
    """
    folder = CODE / "grader" / "autograder"
    files = {name: folder / name for name in SCRIPTS}
    files["requirements.txt"] = CODE.parent / "requirements.txt"
    modules = sorted(path for pattern in MODULES for path in CODE.glob(pattern))
    files |= {path.relative_to(CODE).as_posix(): path for path in modules}
    temporary = target.with_name(target.name + ".part")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, path in files.items():
                entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                mode = 0o100755 if name in SCRIPTS else 0o100644
                entry.create_system, entry.external_attr = 3, mode << 16  # as on Unix
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
        os.replace(temporary, target)
    except OSError as e:
        raise UserError(f"cannot pack {target}: {e}") from None
    finally:
        temporary.unlink(missing_ok=True)


def run(root: Path) -> None:
    """Grade root/submission into root/results/results.json."""
    start = time.monotonic()
    sandbox.limit_judge()
    try:
        submission = read(root / "submission")
        results = grade(submission, Settings(hidden=[root / "results"]))
        record = make_record(submission, results, time.monotonic() - start)
    except UserError as e:
        record = {"score": 0.0, "output": f"Not graded: {e}", "stdout_visibility": "hidden"}
    write_atomically(root / "results" / "results.json", json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
