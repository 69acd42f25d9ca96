"""Tables and CSV files with names that students choose."""

from __future__ import annotations

import csv

from grader.gradebook import Row, format_table, write_csv


def row(student: str, points: dict[str, list[float]]) -> Row:
    extra = {"points": points, "file": "=1+1/student_code.py", "notes": []}
    return Row(student, {"extra_data": extra})


ROWS = [
    row("Ada", {"total": [7.5, 8.0], "bonus": [0.0, 0.0], "conv": [1.5, 2.0]}),
    row('=cmd|"/c calc"!A1', {"total": [8.0, 8.0], "bonus": [0.0, 0.0], "conv": [2.0, 2.0]}),
    Row("Zoë, \x1b[31m\n", note="refused: it holds no student_code.py"),
]


def test_csv(tmp_path):
    write_csv(tmp_path / "grades.csv", ROWS)
    with open(tmp_path / "grades.csv", newline="", encoding="utf-8") as file:
        ada, formula, missing = csv.DictReader(file)
    assert (ada["total"], ada["max_total"], ada["conv"]) == ("7.5", "8.0", "1.5")
    assert formula["student"].startswith("'=") and formula["file"].startswith("'=")
    assert missing["student"] == "Zoë, ?[31m?" and missing["total"] == ""
    assert missing["note"] == "refused: it holds no student_code.py"


def test_table():
    header, ada, formula, missing = format_table(ROWS).split("\n")
    assert header.split() == ["student", "total", "conv"]
    assert ada.split() == ["Ada", "7.5/8", "1.5/2"]
    assert missing.startswith("Zoë, ?[31m?") and missing.split()[2:5] == ["-", "-", "refused:"]
