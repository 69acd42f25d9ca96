"""Grade a class: each zip, folder or .py file in a folder is one student's submission.

    python grade.py SUBMISSIONS/                        # marks in SUBMISSIONS-grades/
    python grade.py SUBMISSIONS/ --csv grades.csv --jobs 4
    python grade.py --gradescope autograder.zip         # pack the autograder for Gradescope

Submissions run in a sandbox (grader/sandbox.py says what it limits); marks are computed in
another process. A run that was stopped continues: what is graded already is not graded again.
Exit status 0 means that every submission has its marks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from checks.grading import CPU_LIMIT, WALL_FACTOR
from grader.gradebook import Row, format_table, write_csv
from grader.judge import find_isolation
from grader.records import load_record, printable, rubric_digest
from grader.sandbox import describe
from grader.submissions import CODE, Submission, looks_like_one, read
from utils import UserError


class OneLineParser(argparse.ArgumentParser):
    """Refuse in one line and point to --help."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("submissions", type=Path, nargs="?", metavar="SUBMISSIONS", help="one entry per student")
    add("--out", type=Path, metavar="FOLDER", help="default: SUBMISSIONS-grades")
    add("--csv", type=Path, metavar="FILE", help="default: grades.csv in the folder of --out")
    add("--jobs", type=int, default=_cores(), metavar="N", help="submissions graded side by side")
    add(
        "--cpu-limit",
        type=float,
        default=CPU_LIMIT,
        metavar="S",
        help=f"CPU seconds for a check, default {CPU_LIMIT:g}; {WALL_FACTOR} times as many in all",
    )
    add("--gradescope", type=Path, metavar="ZIP", help="pack the autograder, grade nothing")
    args = parser.parse_args(argv)
    if bool(args.submissions) == bool(args.gradescope):
        parser.error("name either SUBMISSIONS or --gradescope ZIP")
    if args.jobs < 1 or not args.cpu_limit > 0:
        parser.error("--jobs must be at least 1 and --cpu-limit above 0")
    return args


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """One submission to grade."""

    student: str
    source: Path
    submission: Submission


class Class:
    """The submissions in a folder, and the processes that grade them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder, self.limit, self.jobs = args.submissions.resolve(), args.cpu_limit, args.jobs
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {args.submissions}")
        self.out = args.out or self.folder.with_name(self.folder.name + "-grades")
        self.csv = args.csv or self.out / "grades.csv"
        self.stopped, self.running = threading.Event(), set()
        self.rubric = rubric_digest()

    def find(self) -> tuple[list[Job], list[Row], list[str]]:
        """Submissions that can be read; rows for those that cannot; names of everything else."""
        jobs, refused, skipped = [], [], []
        own = {self.out.resolve(), self.csv.resolve()}
        entries = sorted(path for path in self.folder.iterdir() if path.resolve() not in own)
        stems = [path.stem for path in entries if looks_like_one(path)]
        for path in entries:
            if not looks_like_one(path):
                skipped.append(path.name)
                continue
            unique = stems.count(path.stem) == 1 and not path.is_dir()
            student = path.stem if unique else path.name
            try:
                jobs.append(Job(student, path, read(path)))
            except UserError as e:
                refused.append(Row(student, note=f"refused: {e}"))
        return jobs, refused, skipped

    def record(self, job: Job) -> dict | None:
        """The marks of this job, if they are there already."""
        return load_record(self.out / job.student, job.submission, self.rubric, self.limit)

    def grade(self, job: Job) -> Row:
        """Grade in a process of this submission's own."""
        words = {
            "source": str(job.source),
            "out": str(self.out / job.student),
            "limit": self.limit,
            "hidden": [str(self.folder), str(self.out.resolve())],
        }
        if self.stopped.is_set():
            return Row(job.student, note="not graded: stopped")
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, str(CODE / "grader" / "judge.py"), json.dumps(words)],
                stdin=subprocess.PIPE,  # closed when this process ends: the other then ends, too
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
            self.running.add(process)
            if self.stopped.is_set():
                process.terminate()
            process.wait()
            self.running.discard(process)
            process.stdin.close()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
        record = self.record(job)
        if record is None or process.returncode:
            reason = said[-1] if said else f"the grading process ended ({process.returncode})"
            return Row(job.student, note=f"not graded: {reason}")
        return Row(job.student, record)

    def grade_all(self, jobs: Sequence[Job]) -> list[Row]:
        """Grade side by side, with a progress bar."""
        rows = [Row(job.student, record) for job in jobs if (record := self.record(job))]
        done = {row.student for row in rows}
        todo = [job for job in jobs if job.student not in done]
        if rows:
            print(f"{len(rows)} of {len(jobs)} were graded before")
        with (
            ThreadPoolExecutor(self.jobs) as pool,
            tqdm(total=len(jobs), initial=len(rows), unit="submission") as bar,
        ):
            futures = [pool.submit(self.grade, job) for job in todo]
            try:
                for future in as_completed(futures):
                    rows.append(future.result())
                    bar.set_postfix_str(printable(rows[-1].student), refresh=False)
                    bar.update()
            except BaseException:
                self.stop()
                raise
        return rows

    def stop(self) -> None:
        """End the grading processes; they end their sandboxes."""
        self.stopped.set()
        for process in list(self.running):
            process.terminate()


def grade_class(args: argparse.Namespace) -> int:
    """Grade, print the table, write the CSV; return the exit status."""
    this = Class(args)
    jobs, refused, skipped = this.find()
    for name in skipped:
        print(f"skipped {printable(name)}: neither a zip, a folder nor a .py file")
    if not jobs and not refused:
        raise UserError(f"there is no submission in {args.submissions}")
    if warning := describe(find_isolation()):
        print(f"warning: {warning}", file=sys.stderr)
    try:
        this.out.mkdir(parents=True, exist_ok=True)
        this.csv.parent.mkdir(parents=True, exist_ok=True)
        rows = sorted([*this.grade_all(jobs), *refused], key=lambda row: row.student)
        write_csv(this.csv, rows)
    except OSError as e:
        raise UserError(f"cannot write the marks: {e}") from None
    print(format_table(rows))
    graded = sum(row.record is not None for row in rows)
    print(f"\n{graded} of {len(rows)} graded: {this.csv}; reports in {this.out}")
    return int(graded < len(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = parse(argv)
    if os.name != "posix":
        raise UserError("grade.py needs Linux or macOS; on Windows, run it in a container or WSL")
    if args.gradescope:
        from grader.gradescope import pack

        pack(args.gradescope)
        print(f"{args.gradescope}: upload it to Gradescope as the autograder")
        return 0
    return grade_class(args)


def stop(*_: object) -> None:
    """Handle SIGTERM as Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.stdout.reconfigure(errors="replace")
    try:
        sys.exit(main())
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
