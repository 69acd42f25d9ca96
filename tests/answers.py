"""Right answers, and wrong ones made of them by changing a line or two; for the tests of checks."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import self_check
from checks.grading import SEED, Result, run

ROOT = Path(__file__).resolve().parents[1]
OURS = (ROOT / "code" / "student_code.py").read_text()
STUDENTS = (ROOT / "tests" / "course" / "student_answer.py").read_text()


def module(source: str, *edits: tuple[str, str]) -> ModuleType:
    """An answer as a module, after edits (old, new)."""
    for old, new in edits:
        assert old in source, f"nothing to change: {old}"
        source = source.replace(old, new)
    code = ModuleType("student_code")
    exec(compile(source, "student_code.py", "exec"), code.__dict__)
    return code


def grade(code: ModuleType, name: str, seed: int = SEED) -> Result:
    """The result of the one check whose name starts so."""
    (one,) = (check for check in self_check.RUBRIC if check.name.startswith(name))
    return run(one, code, seed)


def assert_caught(source: str, name: str, hint: str, *edits: tuple[str, str]) -> Result:
    """The answer, after the edits, gets nothing from the check, and the reason."""
    result = grade(module(source, *edits), name)
    assert result.score == 0 and hint in f"{result.problem} {result.hint}"
    assert "cannot be judged" not in result.problem
    return result


def problems(code: ModuleType, *parts: str, seed: int = SEED) -> dict[str, str]:
    """What costs points in these parts, by the check's name."""
    results = self_check.check(code, parts, seed)
    return {result.check.name: result.problem for result in results if result.problem}


# Lines of STUDENTS that are changed
GRAD_WEIGHT = 'torch.einsum("nop,nip->oi", grad, columns).view_as(weight)'
FOLDED = """grad_input = F.fold(
            grad_columns, ctx.size, weight.shape[2], padding=ctx.padding, stride=ctx.stride
        )"""
OVERWRITTEN = """k, s, p = weight.shape[2], ctx.stride, ctx.padding
        h, w = grad_output.shape[2:]
        patches = grad_columns.view(len(grad), -1, k, k, h, w)
        grad_input = patches.new_zeros(len(grad), patches.shape[1], *(n + 2 * p for n in ctx.size))
        for i in range(h):
            for j in range(w):
                grad_input[..., i * s : i * s + k, j * s : j * s + k] = patches[..., i, j]
        grad_input = grad_input[..., p : p + ctx.size[0], p : p + ctx.size[1]]"""
PROJECTED = "output = torch.max(torch.min(output, input + self.eps), input - self.eps)"
UNFOLD = "columns = F.unfold(input_feats, k, padding=padding, stride=stride)"
OUTPUT = "return F.fold(out, sides, 1)"
