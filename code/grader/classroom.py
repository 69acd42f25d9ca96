"""Grade the submissions of a class side by side, each by a process of judge.py."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from grader.gradebook import Row
from grader.records import load_record, printable, rubric_digest
from grader.submissions import CODE, Submission, looks_like_one, read
from utils import UserError


@dataclass(frozen=True)
class Job:
    """One submission to grade."""

    student: str
    source: Path
    submission: Submission


class Classroom:
    """The submissions in a folder, and the processes that grade them.

    folder: one entry per student.
    out: where each student gets a folder with a report and results.json.
    limit: seconds of CPU time for a check.

    Raises:
        UserError: a folder that submissions may not read holds what they need.
    """

    def __init__(self, folder: Path, out: Path, limit: float) -> None:
        self.folder, self.out, self.limit = folder, out, limit
        self.rubric = rubric_digest()
        self.stopped, self.running = threading.Event(), set()
        for hidden in (folder, out):
            if any(Path(path).is_relative_to(hidden) for path in (CODE, sys.prefix)):
                raise UserError(f"{hidden} holds this program or its Python: choose another folder")

    def find(self, ignored: set[Path]) -> tuple[list[Job], list[Row], list[str]]:
        """Submissions that can be read; rows for those that cannot; names of everything else."""
        jobs, refused, skipped = [], [], []
        entries = sorted(path for path in self.folder.iterdir() if path.resolve() not in ignored)
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

    def grade_one(self, job: Job) -> Row:
        """Grade in a separate process, which a hostile submission may at worst end."""
        words = {
            "source": str(job.source),
            "out": str(self.out / job.student),
            "limit": self.limit,
            "hidden": [str(self.folder), str(self.out)],
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

    def grade(self, jobs: Sequence[Job], at_once: int) -> list[Row]:
        """Grade what has no marks yet, with a progress bar."""
        rows = [Row(job.student, record) for job in jobs if (record := self.record(job))]
        done = {row.student for row in rows}
        todo = [job for job in jobs if job.student not in done]
        if rows:
            print(f"{len(rows)} of {len(jobs)} were graded before")
        with (
            ThreadPoolExecutor(at_once) as pool,
            tqdm(total=len(jobs), initial=len(rows), unit="submission") as bar,
        ):
            futures = [pool.submit(self.grade_one, job) for job in todo]
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
