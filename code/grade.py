"""Grade a class: each zip, folder or .py file in a folder is one student's submission.

    python grade.py SUBMISSIONS/                        # marks in SUBMISSIONS-grades/
    python grade.py SUBMISSIONS/ --csv grades.csv --jobs 4
    python grade.py --gradescope autograder.zip         # pack the autograder for Gradescope

Submissions run in a sandbox (grader/sandbox.py says what it limits); marks are computed in
another process. A run that was stopped continues: what is graded already is not graded again.
Exit status 0 means that every submission has its marks.
"""

from __future__ import annotations

import signal

INTERRUPT = signal.getsignal(signal.SIGINT)
if __name__ == "__main__":  # Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from checks.grading import CPU_LIMIT, WALL_FACTOR
from grader.classroom import Classroom
from grader.gradebook import format_table, write_csv
from grader.gradescope import pack
from grader.judge import find_isolation
from grader.records import printable
from grader.sandbox import weaknesses
from utils import UserError


class OneLineParser(argparse.ArgumentParser):
    """Refuse in one line and point to --help."""

    def error(self, message: str) -> None:
        """Print the error in one line; exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(
        usage="%(prog)s SUBMISSIONS [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("submissions", type=Path, nargs="?", metavar="SUBMISSIONS", help="one entry per student")
    add("--out", type=Path, metavar="FOLDER", help="default: SUBMISSIONS-grades")
    add("--csv", type=Path, metavar="FILE", help="default: grades.csv in the folder of --out")
    add(
        "--jobs",
        type=int,
        default=_cores(),
        metavar="N",
        help="submissions at a time; default: the cores",
    )
    add(
        "--cpu-limit",
        "--cpu_limit",
        type=float,
        default=CPU_LIMIT,
        metavar="SECONDS",
        help=f"of CPU time per check, default {CPU_LIMIT:g}; {WALL_FACTOR} times as much wall time",
    )
    add("--gradescope", type=Path, metavar="ZIP", help="pack the autograder, grade nothing")
    args = parser.parse_args(argv)
    if bool(args.submissions) == bool(args.gradescope):
        parser.error("name either SUBMISSIONS or --gradescope ZIP")
    if args.jobs < 1 or not 0 < args.cpu_limit < 1e6:
        parser.error("--jobs must be at least 1 and --cpu-limit above 0")
    return args


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def grade_class(args: argparse.Namespace) -> int:
    """Grade, print the table, write the CSV; return the exit status."""
    folder = args.submissions.resolve()
    if not folder.is_dir():
        raise UserError(f"there is no folder {args.submissions}")
    out = args.out or folder.with_name(folder.name + "-grades")
    marks = args.csv or out / "grades.csv"
    classroom = Classroom(folder, out.resolve(), args.cpu_limit)
    jobs, refused, skipped = classroom.find(ignored={out.resolve(), marks.resolve()})
    for name in skipped:
        print(f"skipped {printable(name)}: neither a zip, a folder nor a .py file")
    if not jobs and not refused:
        raise UserError(f"there is no submission in {args.submissions}")
    for weakness in weaknesses(find_isolation()):
        print(f"warning: {weakness}", file=sys.stderr)
    try:
        out.mkdir(parents=True, exist_ok=True)
        marks.parent.mkdir(parents=True, exist_ok=True)
        rows = sorted([*classroom.grade(jobs, args.jobs), *refused], key=lambda row: row.student)
        write_csv(marks, rows)
    except OSError as e:
        raise UserError(f"cannot write the marks: {e}") from None
    print(format_table(rows))
    graded = sum(row.record is not None for row in rows)
    print(f"\n{graded} of {len(rows)} graded: {marks}; reports in {out}")
    return int(graded < len(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = parse(argv)
    if args.gradescope:
        pack(args.gradescope)
        print(f"{args.gradescope}: upload it to Gradescope as the autograder")
        return 0
    return grade_class(args)


def stop(*_: object) -> None:
    """Handle SIGTERM as Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # an encoding may lack characters of the output
        stream.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, INTERRUPT)
    signal.signal(signal.SIGTERM, stop)
    try:
        sys.exit(main())
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
