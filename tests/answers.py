"""Right answers, and wrong ones made of them by changing a line or two; for test_self_check*.py."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import self_check
from checks.grading import Result, run

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


def grade(code: ModuleType, name: str) -> Result:
    """The result of the one check whose name starts so."""
    (one,) = (check for check in self_check.RUBRIC if check.name.startswith(name))
    return run(one, code)


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
