"""Grade the student_code.py in the folder of this file:

    python self_check.py                              # what code shows: 8 of the 12 points
    python self_check.py --runs ../logs               # and what runs show: 4 points, bonus 2
    python self_check.py --part conv --part attack    # these parts alone
    python self_check.py --explain attack             # what a check does, and why
    python self_check.py --json results.json          # for Gradescope

Under a minute on a CPU. Copy this file and the folder checks/ next to any answer to the assignment:
torch and the answer's own imports are all they need (--runs needs deepvision/ as well). Exit status
0 means all points of the parts asked for; a remark costs none. The answer runs in this process: it
may fail in any way, but it could also change its marks. grade.py runs it in another one.
"""

from __future__ import annotations

import signal

INTERRUPT = signal.getsignal(signal.SIGINT)
if __name__ == "__main__":  # Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import importlib
import json
import os
import sys
import textwrap
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TextIO

from checks import attack, attention, blocks, conv, runs, submission, vit
from checks.grading import CPU_LIMIT, SEED, Check, Result, observe, run

# The handout's points for what code shows: convolution 2, attention 2, ViT 2, adversarial samples 2
RUBRIC: tuple[Check, ...] = (
    conv.CHECKS + attention.CHECKS + blocks.CHECKS + vit.CHECKS + attack.CHECKS
)
EVERYTHING = RUBRIC + runs.CHECKS + submission.CHECKS
PARTS = tuple(dict.fromkeys(check.part for check in RUBRIC + submission.CHECKS))
IMPORT_LIMIT = 4 * CPU_LIMIT
TOTAL = 12  # the handout's points, without its bonus


def import_answer(*_: object) -> dict:
    """The probe of the import: `student_code` from the path."""
    importlib.import_module("student_code")
    return {}


IMPORT = Check("", 0.0, "import", import_answer, lambda inputs, findings: None)


def check(
    code: ModuleType, parts: Collection[str] = PARTS, seed: int = SEED, limit: float = CPU_LIMIT
) -> Iterator[Result]:
    """Grade a module, one check after the other."""
    return (run(one, code, seed, limit) for one in RUBRIC if one.part in parts)


def check_file(parts: Collection[str]) -> Iterator[Result]:
    """Grade the student_code.py on the path; what needs no import is graded in any case."""
    imported = observe(IMPORT, None, limit=IMPORT_LIMIT)
    for one in RUBRIC + submission.CHECKS:
        if one.part not in parts:
            continue
        if imported.error and one.part != "submission":
            yield Result(one, f"importing student_code.py {imported.error}", imported.hint)
        else:
            yield run(one, sys.modules.get("student_code"))


# ---- Output ----------------------------------------------------------------------------------


def format_result(result: Result) -> str:
    """One line, and one more for each line of `result_lines`."""
    one = result.check
    points = "not graded" if result.skipped else f"{result.score:5g} of {one.points:g}"
    lines = [f"{one.part:<10}  {one.name:<40}  {points}"]
    return "\n".join(lines + [f"            {line}" for line in result_lines(result)])


def result_lines(result: Result) -> list[str]:
    """The problem, its hint and the remarks."""
    lines = [text for text in (result.problem, result.skipped) if text]
    lines += [f"hint: {result.hint}"] if result.hint else []
    return lines + [f"remark: {remark}" for remark in result.remarks]


def results_json(results: Sequence[Result], seconds: float) -> dict:
    """The results.json of Gradescope's autograders."""
    return {
        "score": sum(result.score for result in results),
        "execution_time": round(seconds, 1),
        "output": total(results),
        "stdout_visibility": "hidden",
        "tests": [
            {
                "name": f"{result.check.part}: {result.check.name}",
                "score": result.score,
                "max_score": result.max_score,
                "status": "failed" if result.problem else "passed",
                "output": "\n".join(result_lines(result)),
                "visibility": "visible",
            }
            for result in results
        ],
    }


def total(results: Sequence[Result]) -> str:
    """Such as "9.5 of 12, bonus 0 of 2", or "8 of 8; 4 points and the bonus not graded here"."""
    plain = [result for result in results if not result.check.bonus]
    bonus = [result for result in results if result.check.bonus and not result.skipped]
    points = sum(result.max_score for result in plain)
    text = f"{sum(result.score for result in plain):g} of {points:g}"
    if bonus:
        text += f", bonus {sum(r.score for r in bonus):g} of {sum(r.max_score for r in bonus):g}"
    missing = [f"{TOTAL - points:g} points"] if points < TOTAL else []
    missing += [] if bonus else ["the bonus"]
    return text + (f"; {' and '.join(missing)} not graded here" if missing else "")


def explanation(words: str) -> str:
    """What the checks do whose part or name holds these words."""
    found = [c for c in EVERYTHING if words.lower() in f"{c.part}: {c.name}".lower()]
    return "\n\n".join(
        f"{c.part}: {c.name} ({c.points:g} points)\n"
        + textwrap.fill(c.explain, 96, initial_indent="    ", subsequent_indent="    ")
        for c in found
    )


# ---- The command -----------------------------------------------------------------------------


@contextlib.contextmanager
def silence() -> Iterator[TextIO]:
    """Silence the student's file and give it no input; yield the real standard output."""
    stdin, stdout = sys.stdin, sys.stdout
    with contextlib.ExitStack() as stack:
        sys.stdin = nothing = stack.enter_context(open(os.devnull, "r+"))
        stack.callback(setattr, sys, "stdin", stdin)
        stack.enter_context(contextlib.redirect_stdout(nothing))
        stack.enter_context(contextlib.redirect_stderr(nothing))
        yield stdout


def parse_args() -> argparse.Namespace:
    """Read the command line; refuse what cannot be done before any check runs."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be repeated")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="grade run folders: ../logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write Gradescope's results.json")
    parser.add_argument("--explain", metavar="CHECK", help="what checks of this name do, and why")
    args = parser.parse_args()
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.absolute().parent}")
    if args.runs and not args.runs.is_dir():
        parser.error(f"--runs: there is no folder {args.runs}")
    if args.runs and not (Path(__file__).resolve().parent / "deepvision").is_dir():
        parser.error("--runs reads event files and needs deepvision/ beside self_check.py")
    if args.explain is not None and not explanation(args.explain):
        names = "; ".join(f"{c.part}: {c.name}" for c in EVERYTHING)
        parser.error(f"--explain: no check is called {args.explain!r}; there are: {names}")
    return args


def main() -> int:
    """Grade, print, and return the exit status."""
    args = parse_args()
    if args.explain is not None:
        print(explanation(args.explain))
        return 0
    start, results = time.perf_counter(), []
    with silence() as report:
        for result in check_file(args.part or PARTS):
            print(format_result(result), file=report, flush=True)
            results.append(result)
        for result in runs.grade(args.runs) if args.runs else ():
            print(format_result(result), file=report, flush=True)
            results.append(result)
        seconds = time.perf_counter() - start
        print("\nGraded in the answer's own process; grade.py keeps the two apart.", file=report)
        print(f"{total(results)} ({seconds:.0f} s)", file=report, flush=True)
        if args.json:
            args.json.write_text(json.dumps(results_json(results, seconds), indent=2) + "\n")
        status = int(any(result.problem for result in results))
        if threading.active_count() > 1:  # a probe that nothing could stop still runs
            os._exit(status)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGINT, INTERRUPT)
    for stream in (sys.stdout, sys.stderr):  # an encoding may lack characters of the output
        stream.reconfigure(errors="replace")
    try:
        sys.exit(main())
    except OSError as e:
        sys.exit(f"self_check.py: {e}")
    except KeyboardInterrupt:
        os._exit(130)
