"""How a check runs the student's code, and how it judges what was found.

A check has two halves, so that they can run in two processes:

    probe(code, inputs) -> findings      runs the student's code; returns only plain findings
    judge(inputs, findings) -> remarks   computes the expected values; raises CheckFailed

`inputs` are made from a seed, in each process again. Findings are tensors, numbers, strings, bools,
None, and lists and dicts of these. `judge` never sees the student's module, classes or objects.
Hints are computed: the finding is compared with what each known mistake would give.
"""

from __future__ import annotations

import ctypes
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SEED = 2024
CPU_LIMIT = 30.0  # seconds of CPU time for a probe; a right answer takes 1 for the slowest check
WALL_FACTOR = 20  # a probe that sleeps or waits for a lock uses no CPU: the last resort
MAX_NUMEL = 2**24  # of a finding
MAX_TEXT = 500  # characters of a message

Findings = dict[str, Any]
Probe = Callable[[ModuleType, Any], Findings]
Judge = Callable[[Any, Findings], "Sequence[str] | None"]
# What known mistakes would give, by the hint for each
Mistakes = Mapping[str, Callable[[], Tensor]]

CUT = "the graph is cut (detach, .data or no_grad) before backward()"
DTYPE = "a tensor is made with a fixed dtype: give it that of the input"

# Hints for exceptions, by a part of their message
FAMILIAR = {
    "view size is not compatible": "view() needs contiguous memory: use reshape()",
    "incorrect number of gradients": "backward returns five values, one per argument of forward",
    "does not require grad": CUT,
    "is at version": "a tensor that backward needs is changed in place",
    "is a view and is being modified inplace": (
        "the output is a view, which an in-place ReLU cannot change: return a new tensor (clone())"
    ),
    "expected scalar type": DTYPE,
    "to have the same dtype": DTYPE,
}


class CheckFailed(Exception):
    """What is wrong with an answer, and the likely mistake if it is known."""

    def __init__(self, problem: str, hint: str = ""):
        super().__init__(problem)
        self.hint = hint


class NotGraded(Exception):
    """The check asks for nothing here: its points count neither as won nor as lost."""


class _TimeIsUp(BaseException):
    """Raised inside a probe over its limit; no `except Exception` of a student's stops it."""


@dataclass(frozen=True)
class Check:
    """One item of the rubric."""

    part: str
    points: float
    name: str
    probe: Probe
    judge: Judge
    explain: str = ""  # what it does, and where the handout asks for it
    inputs: Callable[[int], Any] = lambda seed: None
    bonus: bool = False


@dataclass(frozen=True)
class Observation:
    """What a probe found: plain data, which `torch.load(weights_only=True)` reads."""

    findings: Findings = field(default_factory=dict)
    error: str = ""
    hint: str = ""
    seconds: float = 0.0  # of CPU time
    remarks: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """For `torch.save`."""
        return asdict(self) | {"remarks": list(self.remarks)}

    @classmethod
    def from_dict(cls, saved: object) -> Observation:
        """Undo `as_dict`; anything else becomes an observation with an error."""
        try:
            findings = plain(saved["findings"])
            texts = [str(saved[name])[:MAX_TEXT] for name in ("error", "hint")]
            remarks = [str(remark)[:MAX_TEXT] for remark in saved["remarks"]]
            return cls(findings, *texts, float(saved["seconds"]), remarks)
        except (CheckFailed, TypeError, LookupError, ValueError, AttributeError, RuntimeError):
            return cls(error="the submission's process wrote something else than findings")


@dataclass(frozen=True)
class Result:
    """The mark of one check."""

    check: Check
    problem: str = ""
    hint: str = ""
    remarks: Sequence[str] = ()
    skipped: str = ""  # why it is not graded

    @property
    def max_score(self) -> float:
        """The points that count: 0 if the check was skipped."""
        return 0.0 if self.skipped else self.check.points

    @property
    def score(self) -> float:
        """All points of the check, or 0."""
        return 0.0 if self.problem else self.max_score


def observe(
    check: Check, code: ModuleType | None, seed: int = SEED, limit: float = CPU_LIMIT
) -> Observation:
    """Make the inputs and run the probe in a thread, so that it may fail in any way, or never end.

    The student's code starts from the same random state each time; torch's, numpy's and Python's
    generators, the default dtype and the number of threads are restored afterwards.
    """
    with fixed_state(seed):
        try:
            inputs = check.inputs(seed)
        except Exception as e:  # the submission changed a function that the inputs need
            return Observation(error=f"the inputs cannot be made: {describe(e)[0]}")
        _seed_all(seed)
        found: list[Observation] = []
        thread = threading.Thread(
            target=lambda: found.append(_attempt_probe(check, code, inputs)), daemon=True
        )
        start_cpu, start = time.process_time(), time.perf_counter()
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            used = time.process_time() - start_cpu
            late = time.perf_counter() - start > WALL_FACTOR * limit
            if thread.is_alive() and (used > limit or late):
                _interrupt(thread)
                cpu, wall = f"{limit:g} s of CPU time", f"{WALL_FACTOR * limit:g} s"
                text = f"not done after {cpu if used > limit else wall}"
                return Observation(error=text, hint="an endless loop, or very slow", seconds=used)
        used = time.process_time() - start_cpu
        ended = found[0] if found else Observation(error="the check's thread ended early")
        return Observation(ended.findings, ended.error, ended.hint, used, ended.remarks)


def judge(check: Check, observation: Observation, seed: int = SEED) -> Result:
    """Compare findings with the expected values; runs none of the student's code."""
    if observation.error:
        return Result(check, observation.error, observation.hint, observation.remarks)
    with fixed_state(seed):
        try:
            inputs = check.inputs(seed)
            _seed_all(seed)
            remarks = check.judge(inputs, observation.findings) or ()
            return Result(check, remarks=(*observation.remarks, *remarks))
        except CheckFailed as e:
            return Result(check, str(e), e.hint, observation.remarks)
        except NotGraded as e:
            return Result(check, skipped=str(e))
        except Exception as e:  # findings of another form than the probe gives
            return Result(check, f"the findings cannot be judged: {type(e).__name__}")


def run(
    check: Check, code: ModuleType | None, seed: int = SEED, limit: float = CPU_LIMIT
) -> Result:
    """Both halves in this process."""
    return judge(check, observe(check, code, seed, limit), seed)


# ---- For observe ------------------------------------------------------------------------------


def _attempt_probe(check: Check, code: ModuleType | None, inputs: object) -> Observation:
    torch.set_num_threads(1)
    try:
        return Observation(plain(check.probe(code, inputs)))
    except CheckFailed as e:
        return Observation(error=str(e), hint=e.hint)
    except BaseException as e:  # a student's file may even call sys.exit
        error, hint = describe(e)
        return Observation(error=error, hint=hint)


def _interrupt(thread: threading.Thread) -> None:
    end = ctypes.pythonapi.PyThreadState_SetAsyncExc
    end(ctypes.c_ulong(thread.ident), ctypes.py_object(_TimeIsUp))
    thread.join(1.0)


@contextmanager
def fixed_state(seed: int) -> Iterator[None]:
    """One thread, float32, seeded generators; afterwards as before. Same marks on any machine."""
    states = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    _seed_all(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy:
            numpy.random.set_state(numpy_state)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


def plain(value: object) -> Any:
    """Findings as plain data: anything else becomes its type's name in angle brackets.

    Raises:
        CheckFailed: a tensor of more than MAX_NUMEL numbers.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        with torch._C.DisableTorchFunctionSubclass():  # a subclass may answer for itself
            if value.numel() > MAX_NUMEL:
                raise CheckFailed(f"a tensor of shape {size(value)} is too large")
            dense = value.detach().as_subclass(Tensor)
            dense = dense.to_dense() if dense.layout != torch.strided else dense
            return dense.cpu().contiguous().clone()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return f"<{type(value).__name__}>"


def attempt(function: Callable, *args: object, **kwargs: object) -> Any:
    """The plain result, or {"error": ..., "hint": ...} for `value`: one case may fail alone."""
    try:
        return plain(function(*args, **kwargs))
    except CheckFailed as e:
        return {"error": str(e), "hint": e.hint}
    except (Exception, SystemExit) as e:
        error, hint = describe(e)
        return {"error": error, "hint": hint}


def describe(error: BaseException) -> tuple[str, str]:
    """One line for an exception, with the student's line that led to it; and a hint."""
    lines = str(error).strip().splitlines()
    message = f"raises {type(error).__name__}" + (f": {lines[0]}" if lines else "")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if Path(frame.filename).name == "student_code.py"]
    hint = next((hint for words, hint in FAMILIAR.items() if words in str(error)), "")
    return message + (f" (student_code.py, line {own[-1]})" if own else ""), hint


def find(code: ModuleType, name: str) -> Callable:
    """A function or class of the student's module, by its name."""
    if not hasattr(code, name):
        raise CheckFailed(f"student_code.py has no {name}")
    return getattr(code, name)


def own(name: str, probe: Probe, judge_own: Judge) -> tuple[Probe, Judge]:
    """Both halves of a check of a class that the editions 2022 and 2023 have in custom_blocks.

    Such a file imports the class, or the TransformerBlock that holds it: there it is not graded.
    """

    def probe_it(code: ModuleType, inputs: object) -> Findings:
        there = next((c for c in (name, "TransformerBlock") if hasattr(code, c)), name)
        module = getattr(getattr(code, there, None), "__module__", "")
        return {"not own": True} if module == "custom_blocks" else probe(code, inputs)

    def judge_it(inputs: object, findings: Findings) -> Sequence[str] | None:
        if "not own" in findings:
            raise NotGraded(f"{name} comes from custom_blocks (editions 2022 and 2023)")
        return judge_own(inputs, findings)

    return probe_it, judge_it


# ---- For judge --------------------------------------------------------------------------------


def value(finding: object, what: str = "") -> Any:
    """A finding of `attempt`; raises CheckFailed for the exception that it holds."""
    if isinstance(finding, Mapping) and "error" in finding:
        problem = f"{what} {finding['error']}" if what else str(finding["error"])
        raise CheckFailed(problem, str(finding.get("hint", "")))
    return finding


def expect(condition: bool, problem: str, hint: str = "") -> None:
    """Raise CheckFailed unless `condition` holds."""
    if not condition:
        raise CheckFailed(problem, hint)


def compare(
    what: str,
    found: object,
    expected: Tensor,
    mistakes: Mistakes | None = None,
    *,
    hint: str = "",
    tol: float = 1e-5,
) -> None:
    """Raise CheckFailed unless both are the same, with the first number that differs.

    hint: where none of the mistakes explains what was found.
    tol: the largest error, as a share of the largest number expected. NaN is wrong too.
    """
    if not isinstance(found, Tensor):
        raise CheckFailed(
            f"{what}: {found!s:.40}, expected a tensor of shape {size(expected)}", hint
        )
    fits = found.shape == expected.shape
    wrong = differs(found, expected, tol) if fits else torch.tensor([True])
    if not wrong.any():
        return
    hint = explain(found, mistakes or {}, tol) or hint
    if (
        fits
        and not hint
        and found.dtype != expected.dtype
        and not differs(found, expected, 1e-4).any()
    ):
        hint = DTYPE
    expect(fits, f"{what}: shape {size(found)}, expected {size(expected)}", hint)
    first = tuple(wrong.nonzero()[0].tolist())
    raise CheckFailed(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} numbers are wrong, first at {first}: "
        f"found {found[first].item():.6g}, expected {expected[first].item():.6g}",
        hint,
    )


def size(tensor: Tensor) -> tuple[int, ...]:
    """The shape, as a message shows it."""
    return tuple(tensor.shape)


def differs(found: Tensor, expected: Tensor, tol: float) -> Tensor:
    """Where two tensors of one shape differ by more than tol × the largest number expected."""
    expected = expected.detach().double()
    scale = expected.abs().max().item() if expected.numel() else 1.0
    close = torch.isclose(found.detach().double(), expected, rtol=0.0, atol=tol * max(scale, 1e-12))
    return ~close


def explain(found: Tensor, mistakes: Mistakes, tol: float) -> str:
    """The hint of the mistake that would give what was found, or ''."""
    if found.numel() > 0 and not found.isfinite().all():
        return "it holds NaN or infinity"
    for hint, result in mistakes.items():
        try:
            candidate = result()
        except RuntimeError:  # impossible in this case, such as a kernel larger than the image
            continue
        if candidate.shape == found.shape and not differs(found, candidate, tol).any():
            return hint
    return ""
