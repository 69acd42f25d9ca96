"""What is kept of a graded submission: results.json (Gradescope's form) and report.txt."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from checks.grading import Result
from grader.submissions import CODE, Submission
from self_check import format_result, results_json

RESULTS, REPORT = "results.json", "report.txt"


def rubric_digest() -> str:
    """SHA-256 of the checks and of the grader: marks of another rubric are not kept."""
    content = hashlib.sha256()
    sources = [*CODE.glob("checks/**/*.py"), *CODE.glob("grader/*.py"), CODE / "self_check.py"]
    for path in sorted(sources):
        content.update(path.relative_to(CODE).as_posix().encode() + b"\0" + path.read_bytes())
    return content.hexdigest()


def make_record(submission: Submission, results: Sequence[Result], seconds: float) -> dict:
    """Gradescope's results.json; `extra_data` holds what load_record and the gradebook need."""
    others = ", ".join(map(str, submission.others))
    notes = [f"graded: {submission.path}; it differs from {others}"] if others else []
    record = results_json(results, seconds)
    record["output"] = "\n".join([*notes, record["output"]])
    record["extra_data"] = {
        "submission": submission.digest,
        "rubric": rubric_digest(),
        "file": str(submission.path),
        "notes": notes,
        "points": _sums(results),
    }
    return record


def write_record(
    folder: Path, submission: Submission, results: Sequence[Result], limit: float, seconds: float
) -> None:
    """Write report.txt, then results.json: a record without the second is no record."""
    record = make_record(submission, results, seconds)
    record["extra_data"]["cpu_limit"] = limit
    lines = [*map(format_result, results), "", record["output"]]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / REPORT, printable("\n".join(lines)) + "\n")
    write_atomically(folder / RESULTS, json.dumps(record, indent=2) + "\n")


def _sums(results: Sequence[Result]) -> dict[str, list[float]]:
    """[points, maximum] of each part, of all parts ("total") and of the bonus."""
    sums: dict[str, list[float]] = {"total": [0.0, 0.0], "bonus": [0.0, 0.0]}
    for result in results:
        which = "bonus" if result.check.bonus else "total"
        for name in {which, "bonus" if result.check.bonus else result.check.part}:
            mine = sums.setdefault(name, [0.0, 0.0])
            sums[name] = [mine[0] + result.score, mine[1] + result.max_score]
    return sums


def load_record(folder: Path, submission: Submission, rubric: str, limit: float) -> dict | None:
    """The results.json of this very submission under this very rubric; None if there is none."""
    try:
        record = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        extra = record["extra_data"]
        found = extra["submission"], extra["rubric"], extra["cpu_limit"]
        same = found == (submission.digest, rubric, limit) and "points" in extra
        return record if same and (folder / REPORT).is_file() else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_atomically(path: Path, text: str) -> None:
    """Write a temporary file, then rename it: a file is never incomplete."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def printable(text: str) -> str:
    """Names and messages of students as a terminal may show them."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
