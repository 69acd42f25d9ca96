"""checks/attack.py: right attacks get all points, wrong ones a hint, lazy ones nothing."""

from __future__ import annotations

import pytest
from answers import OURS, PROJECTED, STUDENTS, assert_caught, grade, module, problems

import self_check
from checks import attack
from checks.grading import run

STEP = "output = output - self.step_size * output.grad.sign()"
ATTACK = [
    ("approaches", STEP, STEP.replace("= output -", "= output +"), "wrong sign: it climbs"),
    ("approaches", STEP, STEP.replace("= output -", "= output.detach() +"),
     "wrong sign: it climbs"),
    ("stronger", STEP, STEP.replace("= output -", "= output +"), "wrong sign: it climbs"),
    ("approaches", "argmin(1)", "argmax(1)", "wrong sign and label"),
    ("stays within", PROJECTED, "pass", "projection is missing"),
    ("stays within", PROJECTED, PROJECTED.replace("input ", "output "), "projection is missing"),
    ("stays within", PROJECTED, f"{PROJECTED}; output = output.clamp(0, 1)", "is normalised"),
    ("stays within", "return output.detach()\n\n\ndefault_attack",
     "return input\n\n\ndefault_attack", "is the perturbed tensor returned"),
    ("steps", ".grad.sign()", ".grad", "sign is not taken"),
    ("steps", "step_size, epsilon\n", "step_size / 255, epsilon / 255\n", "divided by 255"),
    ("each step", f"    {PROJECTED}\n        model.zero", f"{PROJECTED}\n        model.zero",
     "after the last step"),
    ("steps", "self.step_size * output", "self.eps * output", "the size of epsilon"),
    ("steps", "self.step_size * output", "self.step_size / STD * output", "divided by std"),
    ("stays within", "self.loss_fn, self.num_steps = loss_fn, num_steps",
     "self.loss_fn, self.num_steps = loss_fn, num_steps; step_size = step_size / STD; "
     "epsilon = epsilon / STD", "divided by std"),
    ("stronger", ".grad.sign()", ".grad", "sign is not taken"),
    ("steps", PROJECTED, f"{PROJECTED}; break", "only one step"),
    ("network and images", PROJECTED, f"{PROJECTED}; input.copy_(output)", "clone them first"),
    ("network and images", "output = input.clone()", "output = input.clone(); model.eval()",
     "go back to the mode"),
    ("network and images", "output = input.clone()",
     "output = input.clone(); model.requires_grad_(False)", "never the network"),
    ("network and images", "model.zero_grad()",
     "torch.optim.SGD(model.parameters(), 0.1).step()", "never the network"),
    ("fit for", "        model.zero_grad()\n", "", "parameter gradients are left behind"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "hint"), ATTACK)
def test_a_wrong_answer_is_caught_with_the_right_hint(name, old, new, hint):
    std = "\nSTD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)\n"
    assert_caught(STUDENTS + std, name, hint, (old, new))


OURS_WRONG = [
    ("approaches", "-1.0 if self.targeted", "1.0 if self.targeted", "wrong sign: it climbs"),
    ("approaches", "targeted: bool = True", "targeted: bool = False", "the likeliest label"),
    ("stays within", "x_adv = torch.minimum(torch.maximum(x_adv, lower), upper)", "pass",
     "projection is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "hint"), OURS_WRONG)
def test_the_same_mistakes_in_our_answer(name, old, new, hint):
    assert_caught(OURS, name, hint, (old, new))


def test_no_known_mistake_gives_the_right_attack():
    one = attack.ball_attacks(2024)[0]
    assert attack.likely_mistake(attack.pgd(one), one) == ""


# ---- Whole attacks, in place of the student's -------------------------------------------------

SKETCH = """

class Mine:
    def __init__(self, loss_fn, num_steps=10, step_size=0.01, epsilon=0.1):
        self.loss_fn, self.num_steps = loss_fn, num_steps
        self.step_size, self.epsilon = step_size, epsilon

    def perturb(self, model, input):
        adv, label, total = START, model(input).argmin(1), 0
        for _ in range(self.num_steps):
            x = POINT.detach().requires_grad_()
            (g,) = torch.autograd.grad(self.loss_fn(model(x), label), x)
            total = total + g
            adv = adv.detach() - self.step_size * DIRECTION
            adv = torch.min(torch.max(adv, input - self.epsilon), input + self.epsilon)
        return adv.detach()


PGDAttack = default_attack = Mine
"""
BEGIN = "input.clone()"
RANDOM = "input + torch.empty_like(input).uniform_(-self.epsilon, self.epsilon)"
CORNER = "input + self.epsilon * torch.randn_like(input).sign()"
CLIPPED = "input + (self.epsilon * torch.randn_like(input)).clamp(-self.epsilon, self.epsilon)"


def whole(start: str = BEGIN, point: str = "adv", direction: str = "g.sign()"):
    sketch = SKETCH.replace("START", start).replace("POINT", point)
    return module(STUDENTS + sketch.replace("DIRECTION", direction))


@pytest.mark.parametrize(
    "body", ["input", "input.clone()", "input + 0.1 * torch.randn_like(input)"]
)
def test_an_attack_that_moves_nothing_or_noise_gets_nothing(body):
    lazy = STUDENTS + SKETCH.replace("adv, label, total =", f"return {body}\n        adv, l, t =")
    code = module(lazy.replace("START, model(input).argmin(1), 0", "0, 0, 0"))
    results = list(self_check.check(code, ["attack"]))
    assert sum(result.score for result in results) == 0
    assert "randn" in body or all(result.hint for result in results)


@pytest.mark.parametrize("start", [BEGIN, RANDOM], ids=["plain", "random start"])
@pytest.mark.parametrize(
    ("kwargs", "hint"),
    [({"point": "input"}, "at the clean image"), ({"direction": "total.sign()"}, "add up")],
)
def test_a_gradient_at_the_wrong_point_is_caught(start, kwargs, hint):
    result = next(
        run(check, whole(start, **kwargs))
        for check in attack.CHECKS
        if check.name == "each step at the current iterate"
    )
    assert result.score == 0
    assert start == RANDOM or hint in result.hint


@pytest.mark.parametrize("seed", range(24))
def test_right_attacks_get_all_points_for_every_seed(seed):
    start = (BEGIN, RANDOM, CORNER, CLIPPED)[seed % 4]
    assert problems(whole(start), "attack", seed=seed) == {}


@pytest.mark.parametrize("start", [RANDOM, CORNER, CLIPPED])
@pytest.mark.parametrize("factor", ["0", "0.5", "2", "10"])
def test_a_step_of_another_size_is_caught_after_a_random_start(start, factor):
    code = whole(start, direction=f"{factor} * g.sign()")
    assert grade(code, "steps: their size").score == 0


TWO = [
    [(STEP, STEP.replace("= output -", "= output +")), (PROJECTED, f"{PROJECTED}.clamp(0, 1)")],
    [(STEP, STEP.replace("= output -", "= output +")), (PROJECTED, "pass")],
    [("argmin(1)", "argmax(1)"), (PROJECTED, f"{PROJECTED}.clamp(0, 1)")],
    [
        (".grad.sign()", ".grad"),
        (
            STEP.replace(".sign()", ""),
            STEP.replace("= output -", "= output +").replace(".sign()", ""),
        ),
    ],
]


@pytest.mark.parametrize("edits", TWO)
def test_two_mistakes_at_once_have_a_hint_in_every_check(edits):
    results = list(self_check.check(module(STUDENTS, *edits), ["attack"]))
    assert [result.check.name for result in results if result.problem and not result.hint] == []
    assert any("; and " in result.hint for result in results)


def test_a_frozen_network_is_named():
    old = "output = input.clone()"
    edit = (
        old,
        f"{old}\n        for p in model.parameters():\n            p.requires_grad = False",
    )
    result = assert_caught(STUDENTS, "fit for adversarial", "sets requires_grad to False", edit)
    assert "graph is cut" not in result.hint


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
START = "output = input + torch.empty_like(input).uniform_(-self.eps, self.eps)"
RANDOM_START = [("output = input.clone()", START)]


@pytest.mark.parametrize(
    ("edits", "remarks"),
    [
        ([], ["leave [0, 1]", "picked again", "running_mean"]),
        (FIXED, ["leave [0, 1]", "running_mean"]),
        (CLAMPED, ["picked again", "running_mean"]),
        ([*FIXED, *CLAMPED], ["running_mean"]),
        (GRAD, ["leave [0, 1]", "picked again", "running_mean"]),
        (DELTA, ["leave [0, 1]", "picked again", "running_mean"]),
        ([*FIXED, *RANDOM_START], ["leave [0, 1]", "random points", "running_mean"]),
    ],
)
def test_right_attacks_in_other_words_get_all_points(edits, remarks):
    results = list(self_check.check(module(STUDENTS, *edits), ["attack"]))
    assert [result for result in results if result.problem] == []
    found = [remark for result in results for remark in result.remarks]
    assert len(found) == len(remarks)
    assert all(words in remark for words, remark in zip(remarks, found, strict=True))


def test_our_attack_has_no_remark():
    results = self_check.check(module(OURS), ["attack"])
    assert [result.remarks for result in results if result.remarks] == []
