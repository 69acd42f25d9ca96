"""How a check is run, and how it says what is wrong.

A check is a function of the student's module; it raises Wrong, or returns remarks, which cost
nothing. Hints are computed, not guessed: what was found is compared with what each known mistake
would give.
"""

from __future__ import annotations

import ctypes
import random
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

TIME_LIMIT = 30.0  # seconds; a right answer takes 1 for the slowest check

# What known mistakes would give, by the hint that each deserves
Mistakes = Mapping[str, Callable[[], Tensor]]

CUT = "the graph is cut (detach, .data or no_grad) before backward()"
DTYPE = "a tensor is made with a dtype of its own: give it that of the input"

# Hints for exceptions, by a part of their message
FAMILIAR = {
    "view size is not compatible": "view() needs contiguous memory: use reshape()",
    "incorrect number of gradients": "backward returns five values, one per argument of forward",
    "does not require grad": CUT,
    "is at version": "a tensor that backward needs is changed in place",
    "expected scalar type": DTYPE,
    "to have the same dtype": DTYPE,
}


class Wrong(Exception):
    """What is wrong with an answer, and the likely mistake if it is known."""

    def __init__(self, problem: str, hint: str = ""):
        super().__init__(problem)
        self.hint = hint


class _TimeIsUp(BaseException):
    """Thrown into a check that does not end; no `except Exception` of a student's stops it."""


@dataclass(frozen=True)
class Check:
    part: str
    points: float
    name: str
    function: Callable[[ModuleType | None], Sequence[str] | None]


@dataclass(frozen=True)
class Result:
    check: Check
    problem: str = ""
    hint: str = ""
    remarks: Sequence[str] = ()

    @property
    def score(self) -> float:
        return 0.0 if self.problem else self.check.points


def run(check: Check, code: ModuleType | None, limit: float = TIME_LIMIT) -> Result:
    """Run a check in a thread of its own, so that it may fail in any way, or never end."""
    results: list[Result] = []
    thread = threading.Thread(
        target=lambda: results.append(_attempt(check, code)), name=check.name, daemon=True
    )
    states = torch.get_rng_state(), random.getstate(), torch.get_default_dtype()
    torch.manual_seed(2024)
    torch.set_default_dtype(torch.float32)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        end = ctypes.pythonapi.PyThreadState_SetAsyncExc
        end(ctypes.c_ulong(thread.ident), ctypes.py_object(_TimeIsUp))
        thread.join(1.0)
        results[:] = [
            Result(check, f"not done after {limit:g} s", "a loop without an end, or very slow")
        ]
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    torch.set_default_dtype(states[2])
    return results[0]


def _attempt(check: Check, code: ModuleType | None) -> Result:
    try:
        return Result(check, remarks=check.function(code) or ())
    except Wrong as e:
        return Result(check, str(e), e.hint)
    except BaseException as e:  # a student's file may even call sys.exit
        return Result(check, *describe(e))


def describe(error: BaseException) -> tuple[str, str]:
    """One line for an exception, with the student's line that led to it; and a hint."""
    lines = str(error).strip().splitlines()
    message = f"raises {type(error).__name__}" + (f": {lines[0]}" if lines else "")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if Path(frame.filename).name == "student_code.py"]
    hint = next((hint for words, hint in FAMILIAR.items() if words in str(error)), "")
    return message + (f" (student_code.py, line {own[-1]})" if own else ""), hint


def find(code: ModuleType, name: str) -> Callable:
    """Something of the student's, by its name."""
    if not hasattr(code, name):
        raise Wrong(f"student_code.py has no {name}")
    return getattr(code, name)


def expect(condition: bool, problem: str, hint: str = "") -> None:
    if not condition:
        raise Wrong(problem, hint)


def compare(
    what: str,
    found: object,
    expected: Tensor,
    mistakes: Mistakes | None = None,
    *,
    hint: str = "",
    tol: float = 1e-5,
) -> None:
    """Raise Wrong unless both are the same, with the first number that differs.

    hint: where none of the mistakes explains what was found.
    tol: the largest error, as a share of the largest number expected. NaN is wrong too.
    """
    if not isinstance(found, Tensor):
        raise Wrong(f"{what}: {found!r:.40}, expected a tensor of shape {size(expected)}", hint)
    fits = found.shape == expected.shape
    wrong = differs(found, expected, tol) if fits else torch.tensor([True])
    if not wrong.any():
        return
    hint = explain(found, mistakes or {}, tol) or hint
    expect(fits, f"{what}: shape {size(found)}, expected {size(expected)}", hint)
    first = tuple(wrong.nonzero()[0].tolist())
    raise Wrong(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} numbers are wrong, first at {first}: "
        f"found {found[first].item():.6g}, expected {expected[first].item():.6g}",
        hint,
    )


def size(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def differs(found: Tensor, expected: Tensor, tol: float) -> Tensor:
    expected = expected.detach().double()
    scale = expected.abs().max().item() if expected.numel() else 1.0
    close = torch.isclose(found.detach().double(), expected, rtol=0.0, atol=tol * max(scale, 1e-12))
    return ~close


def explain(found: Tensor, mistakes: Mistakes, tol: float) -> str:
    """The hint of the mistake that would give just what was found, if there is one."""
    if found.numel() > 0 and not found.isfinite().all():
        return "it holds NaN or infinity"
    for hint, result in mistakes.items():
        candidate = result()
        if candidate.shape == found.shape and not differs(found, candidate, tol).any():
            return hint
    return ""
