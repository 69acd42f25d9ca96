"""The marks of a class: a table for the console, and a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grader.records import printable, write_atomically


@dataclass(frozen=True)
class Row:
    """A student's marks; without a record, `note` says why there are none."""

    student: str
    record: dict | None = None
    note: str = ""

    @property
    def points(self) -> dict[str, list[float]]:
        """[points, maximum] of "total", "bonus" and of each part."""
        return self.record["extra_data"]["points"] if self.record else {}


def _header(rows: Sequence[Row]) -> list[str]:
    parts = dict.fromkeys(name for row in rows for name in row.points)
    parts.pop("total", None)
    parts.pop("bonus", None)
    bonus = any(row.points.get("bonus", (0, 0))[1] for row in rows)
    return ["total", *(["bonus"] if bonus else []), *parts]


def format_table(rows: Sequence[Row]) -> str:
    """One line per student: points of the maximum, for the whole and for each part."""
    columns = _header(rows)
    lines = [["student", *columns, ""]]
    for row in rows:
        cells = [f"{p[0]:g}/{p[1]:g}" if (p := row.points.get(c)) else "-" for c in columns]
        lines.append([printable(row.student).replace("\n", "?"), *cells, printable(_notes(row))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write one row per student; marks that are missing are empty cells."""
    columns = _header(rows)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["student", *columns, *(f"max_{name}" for name in columns), "file", "note"])
    for row in rows:
        points = [row.points.get(name, ("", "")) for name in columns]
        file = row.record["extra_data"]["file"] if row.record else ""
        marks = [p[0] for p in points] + [p[1] for p in points]
        writer.writerow([_cell(row.student), *marks, _cell(file), _cell(_notes(row))])
    write_atomically(path, text.getvalue())


def _notes(row: Row) -> str:
    notes = row.record["extra_data"]["notes"] if row.record else []
    return "; ".join([*notes, *([row.note] if row.note else [])])


def _cell(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    text = printable(text).replace("\n", "?")
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
