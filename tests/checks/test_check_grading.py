"""checks/grading.py: two halves, plain findings, limits, and the same marks each time."""

# ruff: noqa: NPY002 - students draw from the global generator
from __future__ import annotations

import io
import random
import subprocess
import sys
import threading
import time
from types import ModuleType

import numpy as np
import pytest
import torch
from answers import OURS, ROOT, STUDENTS, grade, module, problems

import self_check
from checks import grading
from checks.grading import Check, CheckFailed, Observation, compare, judge, observe, run


def probe_only(probe, judge_it=lambda inputs, findings: None) -> Check:
    return Check("conv", 1.0, "made up", probe, judge_it)


# ---- Two halves -------------------------------------------------------------------------------

JUDGING = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
import self_check
from checks.grading import Observation, judge
saved = torch.load(sys.argv[1], weights_only=True)
for check in self_check.RUBRIC:
    result = judge(check, Observation.from_dict(saved[check.name]))
    print(result.score, check.points, result.problem)
assert "student_code" not in sys.modules
"""


def test_marks_are_computed_in_a_process_that_never_imports_the_answer(tmp_path):
    code = module(STUDENTS, ("out = out + bias[:, None]", "pass"))
    saved = {check.name: observe(check, code).as_dict() for check in self_check.RUBRIC}
    torch.save(saved, tmp_path / "observed.pt")
    words = [sys.executable, "-c", JUDGING, str(tmp_path / "observed.pt"), str(ROOT / "code")]
    done = subprocess.run(words, capture_output=True, text=True)
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    scores = [run(check, code).score for check in self_check.RUBRIC]
    assert [float(line[0]) for line in lines] == scores
    assert 0 < sum(scores) < 8


class Rogue(torch.Tensor):
    """A tensor that claims to equal everything."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return torch.zeros(1)


def test_findings_are_plain_whatever_the_answer_returns():
    findings = {
        "a tensor": torch.ones(3).as_subclass(Rogue),
        "an object": object(),
        "nested": [(1, "x", None, {"key": torch.ones(1, requires_grad=True)})],
    }
    found = observe(probe_only(lambda code, inputs: findings), None).findings
    assert type(found["a tensor"]) is torch.Tensor and found["a tensor"].sum() == 3
    assert found["an object"] == "<object>"
    assert not found["nested"][0][3]["key"].requires_grad
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == findings.keys()


@pytest.mark.parametrize(
    "saved",
    [None, [], {}, {"findings": {}, "error": "", "hint": "", "seconds": "x", "remarks": []}],
)
def test_what_is_no_observation_is_an_error(saved):
    result = judge(self_check.RUBRIC[0], Observation.from_dict(saved))
    assert result.score == 0 and "something else than findings" in result.problem


@pytest.mark.parametrize("check", self_check.RUBRIC, ids=lambda check: check.name)
def test_forged_findings_get_nothing(check):
    for findings in ({}, {"cases": []}, {"found": [torch.ones(2)] * 9}, {"y": 1, "calls": []}):
        assert judge(check, Observation(findings)).score == 0


def test_a_huge_tensor_is_refused_by_its_shape():
    expanded = torch.zeros(1).expand(2**40)
    observation = observe(probe_only(lambda code, inputs: {"x": expanded}), None)
    assert "too large" in observation.error


# ---- Limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["pass", "try:\n  while True: pass\n except Exception: pass"])
def test_a_check_without_end_is_ended(body):
    def endless(code, inputs):
        exec(f"while True:\n {body}", {})

    before = threading.active_count()
    result = run(probe_only(endless), None, limit=0.3)
    assert (result.score, result.problem) == (0, "not done after 0.3 s of CPU time")
    assert threading.active_count() == before


def test_sleep_is_ended_by_wall_time_and_costs_no_cpu_time():
    def sleepy(code, inputs):
        time.sleep(0.5)
        return {}

    assert run(probe_only(sleepy), None, limit=0.2).problem == ""
    late = observe(probe_only(sleepy), None, limit=0.01)
    assert late.error == "not done after 0.2 s" and late.seconds < 0.2


def test_the_limit_counts_cpu_time_of_a_busy_machine():
    """The process gets less than all of the time, as case 10 has it: the limit knows."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:

        def work(code, inputs):
            start = time.process_time()
            while time.process_time() - start < 0.4:
                pass
            return {}

        assert run(probe_only(work), None, limit=1.0).problem == ""
    finally:
        for process in busy:
            process.kill()
            process.wait()


# ---- The same marks ---------------------------------------------------------------------------


def draw(code, inputs):
    seen = [torch.get_default_dtype(), torch.rand(()), np.random.rand(), random.random()]
    torch.manual_seed(1), random.seed(1), np.random.seed(1), torch.set_default_dtype(torch.half)
    return {"seen": f"{seen} {torch.get_num_threads()}"}


def test_a_check_starts_the_same_and_leaves_random_numbers_and_dtypes_as_they_were():
    torch.set_default_dtype(torch.double)
    try:
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        first, second = (observe(probe_only(draw), None).findings["seen"] for _ in range(2))
        assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
        assert (before[2] == np.random.get_state()[1]).all()
        assert torch.get_default_dtype() == torch.double
    finally:
        torch.set_default_dtype(torch.float)
    assert first == second and first.startswith("[torch.float32")


SOMETIMES = """

import numpy as np


class Sometimes(SimpleNet):
    def forward(self, x):
        return super().forward(x + 0.5 * (np.random.rand() < 0.3))


default_cnn_model = Sometimes
"""


def test_a_file_that_draws_from_numpy_gets_the_same_marks_each_time():
    found = set()
    for _ in range(5):
        np.random.rand(7)  # the state before differs
        found.add(grade(module(STUDENTS + SOMETIMES), "the CNN").problem)
    assert len(found) == 1


def test_a_file_that_seeds_and_changes_the_dtype_gets_its_points():
    unruly = "B, H, W, C = x.shape; torch.manual_seed(0)"
    code = module(STUDENTS, ("B, H, W, C = x.shape", unruly))
    torch.set_default_dtype(torch.double)
    try:
        assert problems(code, "attention", "blocks", "vit") == {}
    finally:
        torch.set_default_dtype(torch.float)


@pytest.mark.parametrize("source", [OURS, STUDENTS], ids=["ours", "a student's"])
@pytest.mark.parametrize("seed", [0, 1, grading.SEED])
def test_right_answers_get_all_points_for_every_seed(source, seed):
    assert problems(module(source), *self_check.PARTS, seed=seed) == {}


# ---- Messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("softmax", "B, H, W, C = x.shape", "raise ValueError('two\\nlines')",
         "raises ValueError: two (student_code.py, line "),
        ("softmax", "B, H, W, C = x.shape", "sys.exit()", "raises SystemExit"),
        ("softmax", "B, H, W, C = x.shape", "return self.forward(x)", "raises RecursionError"),
        ("shapes", "default_vit_model = SimpleViT", "", "student_code.py has no default_vit_model"),
        ("stays within", "return output.detach()\n\n\ndefault_attack", "default_attack",
         "perturb gives NoneType for images (8, 3, 16, 16)"),
    ],
)  # fmt: skip
def test_what_is_raised_or_missing_is_one_line(name, old, new, problem):
    source = STUDENTS.replace("import torch\n", "import sys, torch\n")
    result = grade(module(source, (old, new)), name)
    assert problem in result.problem and "\n" not in result.problem


def test_nan_and_the_first_wrong_number_are_named():
    right = torch.arange(4.0).view(2, 2)
    wrong = right.clone()
    wrong[1, 0] = 7
    with pytest.raises(CheckFailed, match=r"1 of 4 .* first at \(1, 0\): found 7, expected 2"):
        compare("x", wrong, right)
    with pytest.raises(CheckFailed, match=r"shape \(2,\), expected \(2, 2\)"):
        compare("x", right[0], right)
    with pytest.raises(CheckFailed) as error:
        compare("x", right / 0, right)
    assert error.value.hint == "it holds NaN or infinity"


def test_the_course_module_is_found_by_name_alone():
    empty = ModuleType("student_code")
    assert sum(result.score for result in self_check.check(empty)) == 0
