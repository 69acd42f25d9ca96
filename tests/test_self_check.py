"""self_check.py: right answers get all points, files may misbehave, the command tells and exits."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from answers import (
    FOLDED,
    GRAD_WEIGHT,
    OURS,
    OVERWRITTEN,
    PROJECTED,
    ROOT,
    STUDENTS,
    grade,
    module,
)

import self_check
from checks import submission
from checks.grading import Check, Result, CheckFailed, run

ANSWER_PARTS = tuple(part for part in self_check.PARTS if part != "submission")

# ---- Right answers, written differently ---------------------------------------------------------


def lost(code: ModuleType, parts) -> list[Result]:
    return [result for result in self_check.check(code, parts) if result.problem]


@pytest.mark.parametrize("source", [OURS, STUDENTS], ids=["ours", "a student's"])
def test_right_answers_get_all_points(source):
    assert lost(module(source), ANSWER_PARTS) == []
    assert sum(check.points for check in self_check.RUBRIC) == 14


EINSUM = """attn = torch.einsum("bhnd,bhmd->bhnm", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        return self.proj(torch.einsum("bhnm,bhmd->bnhd", attn, v).reshape(B, H, W, C))"""
FUSED = (
    "return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C))"
)
EXPLICIT = """attn = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, H, W, C))"""
SLIDES = """windows = F.pad(input_feats, (padding,) * 4).unfold(2, k, stride).unfold(3, k, stride)
        columns = windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)"""
UNFOLD = "columns = F.unfold(input_feats, k, padding=padding, stride=stride)"
PER_IMAGE = "sum(g @ c.t() for g, c in zip(grad, columns)).view_as(weight)"
FIXED = [("for _ in range", "least = model(output).argmin(1)\n        for _ in range"),
         ("logits.argmin(1)", "least")]  # fmt: skip
CLAMPED = [(PROJECTED, f"""{PROJECTED}
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in
                         ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
            output = (output * std + mean).clamp(0, 1).sub(mean).div(std)""")]  # fmt: skip
GRAD = [("self.loss_fn(logits, logits.argmin(1)).backward()",
         "grad, = torch.autograd.grad(self.loss_fn(logits, logits.argmin(1)), output)"),
        ("output.grad.sign()", "grad.sign()"), ("        model.zero_grad()\n", "")]  # fmt: skip
DELTA = [("output = output - self.step_size * output.grad.sign()",
          "delta = output.detach() - self.step_size * output.grad.sign() - input"),
         (PROJECTED, "output = input + delta.clamp(-self.eps, self.eps)")]  # fmt: skip
RANDOM = [("output = input.clone()",
           "output = input + torch.empty_like(input).uniform_(-self.eps, self.eps)")]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "edits", "remarks"),
    [
        ("attention", [(EXPLICIT, EINSUM)], []),
        ("attention", [(EXPLICIT, FUSED)], []),
        ("conv", [(UNFOLD, SLIDES), (GRAD_WEIGHT, PER_IMAGE)], []),
        ("conv", [(FOLDED, OVERWRITTEN.replace("] = patches", "] += patches"))], []),
        ("blocks", [], ["pad a window act as keys"]),
        ("attack", [], ["leave [0, 1]", "picked anew", "running_mean"]),
        ("attack", FIXED, ["leave [0, 1]", "running_mean"]),
        ("attack", CLAMPED, ["picked anew", "running_mean"]),
        ("attack", [*FIXED, *CLAMPED], ["running_mean"]),
        ("attack", GRAD, ["leave [0, 1]", "picked anew", "running_mean"]),
        ("attack", DELTA, ["leave [0, 1]", "picked anew", "running_mean"]),
        ("attack", [*FIXED, *RANDOM], ["leave [0, 1]", "random start", "running_mean"]),
    ],
)
def test_right_answers_in_other_words_get_all_points(part, edits, remarks):
    results = list(self_check.check(module(STUDENTS, *edits), [part]))
    assert [result for result in results if result.problem] == []
    said = [remark for result in results for remark in result.remarks]
    assert len(said) == len(remarks)
    assert all(words in remark for words, remark in zip(remarks, said, strict=True))


def test_our_answer_gives_no_reason_for_a_remark():
    assert [
        r.remarks for r in self_check.check(module(OURS), ["blocks", "attack"]) if r.remarks
    ] == []


# ---- Files that misbehave -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("softmax", "B, H, W, C = x.shape", "raise ValueError('two\\nlines')",
         "raises ValueError: two (student_code.py, line "),
        ("softmax", "B, H, W, C = x.shape", "sys.exit()", "raises SystemExit"),
        ("softmax", "B, H, W, C = x.shape", "return self.forward(x)", "raises RecursionError"),
        ("shapes", "default_vit_model = SimpleViT", "", "student_code.py has no default_vit_model"),
        ("windows cut", "    window_partition,\n", "", ""),
        ("stays within", "return output.detach()\n\n\ndefault_attack", "default_attack",
         "perturb gives NoneType for images (8, 3, 16, 16)"),
    ],
)  # fmt: skip
def test_what_is_raised_or_missing_is_one_line(name, old, new, problem):
    result = grade(
        module(STUDENTS.replace("import torch\n", "import sys, torch\n"), (old, new)), name
    )
    assert problem in result.problem and bool(result.problem) == bool(problem)
    assert "\n" not in self_check.in_words(result).partition("\n")[2] or not problem


@pytest.mark.parametrize("body", ["pass", "try:\n  while True: pass\n except Exception: pass"])
def test_a_check_without_end_is_ended(body):
    def endless(code):
        exec(f"while True:\n {body}", {})

    before = threading.active_count()
    result = run(Check("conv", 1.0, "endless", endless), None, limit=0.3)
    assert (result.score, result.problem) == (0, "not done after 0.3 s")
    assert threading.active_count() == before


def test_a_check_starts_the_same_and_leaves_random_numbers_and_dtypes_as_they_were():
    def unruly(code):
        seen = f"{torch.get_default_dtype()} {torch.rand(())}"
        torch.manual_seed(1), random.seed(1), torch.set_default_dtype(torch.half)
        return [seen]

    torch.set_default_dtype(torch.double)
    try:
        states = torch.get_rng_state(), random.getstate()
        first, second = (run(Check("conv", 1.0, "unruly", unruly), None) for _ in range(2))
        assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
        assert torch.get_default_dtype() == torch.double
    finally:
        torch.set_default_dtype(torch.float)
    assert first.remarks == second.remarks
    assert first.remarks[0].startswith("torch.float32")


def test_a_file_that_seeds_and_changes_the_dtype_gets_its_points():
    unruly = "B, H, W, C = x.shape; torch.manual_seed(0)"
    code = module(STUDENTS, ("B, H, W, C = x.shape", unruly))
    torch.set_default_dtype(torch.double)
    try:
        assert lost(code, ["attention", "blocks", "vit"]) == []
    finally:
        torch.set_default_dtype(torch.float)


# ---- The submission -----------------------------------------------------------------------------

PACK = "import zipfile; z = zipfile.ZipFile('out.zip', 'w'); [z.write(f) for f in {}]; z.close()"


@pytest.mark.parametrize(
    ("packer", "problem"),
    [
        (None, "no zip_submission.py"),
        ("pass", "made no zip file"),
        ("import sys; sys.exit('no space')", "python zip_submission.py fails: no space"),
        (
            PACK.format(["code/student_code.py", "code/net.pth"]),
            "out.zip holds models: code/net.pth",
        ),
        (PACK.format(["code/net.pth.py"]), "out.zip holds no student_code.py"),
        (
            f"open('code/student_code.py', 'w'); {PACK.format(['code/student_code.py'])}",
            "is another",
        ),
        (PACK.format(["code/student_code.py"]), "No module named 'beside_me'"),
        (PACK.format(["code/student_code.py", "code/beside_me.py"]), None),
        ("open('out.zip', 'w').write('not a zip')", "out.zip is damaged"),
    ],
)
def test_what_is_handed_in_is_unpacked_and_imported(tmp_path, packer, problem):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "student_code.py").write_text("import beside_me")
    for name in ("beside_me.py", "net.pth", "net.pth.py"):
        (tmp_path / "code" / name).touch()
    if packer is not None:
        (tmp_path / "zip_submission.py").write_text(packer)
    if problem is None:
        assert submission.check_project(tmp_path) == [
            "writeup/ holds neither a PDF nor a Markdown file"
        ]
    else:
        with pytest.raises(CheckFailed, match=problem):
            submission.check_project(tmp_path)


# ---- The command --------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """self_check.py and checks/ beside another's answer, in a folder of its own."""
    shutil.copy(ROOT / "code" / "self_check.py", tmp_path)
    shutil.copytree(ROOT / "code" / "checks", tmp_path / "checks")
    shutil.copy(ROOT / "code" / "custom_blocks.py", tmp_path)
    return tmp_path


def command(tree: Path, source: str, *words: str) -> tuple[int, str]:
    (tree / "student_code.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "self_check.py", *words],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_the_command_grades_a_file_and_writes_json(tree):
    """An answer that talks, that has no ViT, and whose attack goes the wrong way."""
    assert command(tree, OURS, "--part", "attention", "--part", "blocks")[0] == 0
    wrong = OURS.replace("default_vit_model = SimpleViT", "").replace("-1.0 if self", "1.0 if self")
    words = ["--part", "attack", "--part", "vit", "--json", "results.json"]
    code, said = command(
        tree, wrong.replace("import torch\n", "import torch\nprint('me')\n", 1), *words
    )
    assert code == 1 and "me\n" not in said
    assert "hint: wrong sign" in said and "has no default_vit_model" in said
    assert re.search(r"^2.75 of 6 points, in \d+ s$", said, re.M)
    content = json.loads((tree / "results.json").read_text())
    assert content["score"] == sum(test["score"] for test in content["tests"]) == 2.75
    test = content["tests"][5]
    assert test.keys() == {"name", "score", "max_score", "status", "output", "visibility"}
    assert (test["name"], test["status"]) == ("attack: approaches the least likely label", "failed")
    assert "hint: wrong sign" in test["output"]


def test_a_file_that_cannot_be_imported_is_a_line_for_each_check(tree):
    code, said = command(tree, "import torch\nprint(", "--part", "vit")
    assert code == 1 and said.count("importing student_code.py raises SyntaxError") == 4
    assert "0 of 2 points" in said


def test_a_json_file_that_cannot_be_is_refused_before_the_work(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["self_check.py", "--json", "nowhere/results.json"])
    with pytest.raises(SystemExit) as exit_:
        self_check.main()
    said = capsys.readouterr()
    assert exit_.value.code == 2 and said.out == "" and "there is no folder" in said.err
