"""Grade the student_code.py that lies beside this file:

    python self_check.py                              # everything
    python self_check.py --part conv --part attack    # these parts alone
    python self_check.py --json results.json          # for Gradescope

Under a minute on a CPU. Drop this file and the folder checks/ beside any answer to the assignment:
torch and the answer's own imports are all they need (the submission, zip_submission.py as well).
Exit status 0 means all points of the parts asked for; a remark costs none. The answer runs in this
process: it may fail in any way, but a stranger's belongs in a container.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import TextIO

from checks import attack, attention, blocks, conv, submission, vit
from checks.grading import TIME_LIMIT, Check, Result, run

# The assignment gives 12 points and 2 of bonus; how they are spread over its parts is our choice.
RUBRIC = tuple(
    Check(*row)
    for row in (
        # Part I: 4 points
        ("conv", 1.0, "forward: kernels, strides, paddings, bias", conv.check_forward),
        ("conv", 0.5, "memory layouts and dtypes", conv.check_layouts),
        ("conv", 0.75, "gradient of the input", conv.check_input_gradient),
        ("conv", 0.75, "gradient of the weight", conv.check_weight_gradient),
        ("conv", 0.25, "gradient of the bias", conv.check_bias_gradient),
        ("conv", 0.5, "CustomConv2d trains like nn.Conv2d", conv.check_module),
        ("conv", 0.25, "the CNN runs on CustomConv2d", conv.check_network),
        # Part II: 5 points
        ("attention", 1.0, "softmax attention, head by head", attention.check_values),
        ("attention", 0.5, "large scores, beside PyTorch's own", attention.check_against_torch),
        ("attention", 0.5, "gradients", attention.check_gradients),
        ("blocks", 0.25, "windows cut and put together", blocks.check_windows),
        ("blocks", 0.25, "residual branches, global attention", blocks.check_block),
        ("blocks", 0.5, "attention within windows", blocks.check_windowed_block),
        ("vit", 0.5, "shapes, one image or many", vit.check_shapes),
        ("vit", 0.5, "every parameter is used", vit.check_parameters),
        ("vit", 0.5, "learns a small batch", vit.check_learning),
        ("vit", 0.5, "networks survive a checkpoint", vit.check_checkpoint),
        # Part III: 3 points
        ("attack", 0.5, "stays within epsilon", attack.check_ball),
        ("attack", 0.75, "approaches the least likely label", attack.check_direction),
        ("attack", 0.5, "stronger than noise", attack.check_strength),
        ("attack", 0.75, "steps: their size, more of them", attack.check_steps),
        ("attack", 0.5, "network and images as before", attack.check_state),
        # Bonus: 2 points
        ("attack", 1.0, "bonus: fit for adversarial training", attack.check_training),
        ("submission", 1.0, "bonus: zip, unpack, import", submission.check_zip),
    )
)
PARTS = tuple(dict.fromkeys(check.part for check in RUBRIC))


def import_answer(_: None) -> None:
    importlib.import_module("student_code")


def check(
    code: ModuleType, parts: Collection[str] = PARTS, limit: float = TIME_LIMIT
) -> Iterator[Result]:
    """Grade a module, one check after the other."""
    return (run(one, code, limit) for one in RUBRIC if one.part in parts)


def check_file(parts: Collection[str]) -> Iterator[Result]:
    """Grade the file beside; what needs no import is graded even where it cannot be imported."""
    imported = run(Check("", 0.0, "import", import_answer), None)
    for one in RUBRIC:
        if one.part not in parts:
            continue
        if imported.problem and one.part != "submission":
            yield Result(one, f"importing student_code.py {imported.problem}", imported.hint)
        else:
            yield run(one, sys.modules.get("student_code"))


def in_words(result: Result) -> str:
    one = result.check
    lines = [f"{one.part:<10}  {one.name:<40}  {result.score:4g} of {one.points:g}"]
    return "\n".join(lines + [f"            {line}" for line in told(result)])


def told(result: Result) -> list[str]:
    lines = [result.problem] if result.problem else []
    lines += [f"hint: {result.hint}"] if result.hint else []
    return lines + [f"remark: {remark}" for remark in result.remarks]


def for_gradescope(results: list[Result], seconds: float) -> dict:
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
                "max_score": result.check.points,
                "status": "failed" if result.problem else "passed",
                "output": "\n".join(told(result)),
                "visibility": "visible",
            }
            for result in results
        ],
    }


def total(results: list[Result]) -> str:
    points = sum(result.check.points for result in results)
    return f"{sum(result.score for result in results):g} of {points:g} points"


@contextlib.contextmanager
def silence() -> Iterator[TextIO]:
    """What a student's file prints is not shown, and what it asks for is not answered.

    Yields the standard output that was.
    """
    stdin, stdout = sys.stdin, sys.stdout
    with contextlib.ExitStack() as stack:
        sys.stdin = nothing = stack.enter_context(open(os.devnull, "r+"))
        stack.callback(setattr, sys, "stdin", stdin)
        stack.enter_context(contextlib.redirect_stdout(nothing))
        stack.enter_context(contextlib.redirect_stderr(nothing))
        yield stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].rstrip(":"))
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write Gradescope's results.json")
    args = parser.parse_args()
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.absolute().parent}")
    start, results = time.perf_counter(), []
    with silence() as report:
        for result in check_file(args.part or PARTS):
            print(in_words(result), file=report, flush=True)
            results.append(result)
        seconds = time.perf_counter() - start
        print(f"\n{total(results)}, in {seconds:.0f} s", file=report, flush=True)
        if args.json:
            args.json.write_text(json.dumps(for_gradescope(results, seconds), indent=2) + "\n")
        status = int(any(result.problem for result in results))
        if threading.active_count() > 1:  # a check that nothing could stop is still at it
            os._exit(status)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as e:
        sys.exit(f"self_check.py: {e}")
    except KeyboardInterrupt:
        os._exit(130)
