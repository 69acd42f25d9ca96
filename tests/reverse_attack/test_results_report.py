"""The verdict and the worst case."""

from __future__ import annotations

import pytest
import torch

from reverse_attack import results_report
from reverse_attack.cost import Cost
from reverse_attack.protocol import KNOWN_VIEWS, Result


def result(fixed: int, broken: int) -> Result:
    """40 images, of which the defence changes these."""
    static = torch.arange(40) < 20
    defended = static.clone()
    defended[20 : 20 + fixed], defended[:broken] = True, False
    return Result(static, defended, Cost(2, 0.5), Cost(3, 0.25))


@pytest.mark.parametrize(
    ("fixed", "broken", "words"),
    [(15, 2, "the reversal helps"), (1, 14, "the reversal harms"), (6, 3, "not shown to help")],
)
def test_the_verdict_says_which_way_the_counts_point(fixed, broken, words):
    row = results_report.as_row(result(fixed, broken))
    assert row["gain"] == pytest.approx(100 * (fixed - broken) / 40)
    content = {
        "transfer": {"clean": {"transfer": row}, "PGD": {"transfer": row}},
        "controls": {"untrained head": {"control": row}, "noise": {"control": row}},
        "worst_case": row,
    }
    assert words in results_report.format_verdict(content)


def test_the_worst_case_needs_every_answer_right():
    """Attacks that know the defender's views do not count."""
    table = {"a": {"x": result(10, 0), "y": result(0, 5)}, "b": {"x": result(3, 0)}}
    table["b"][KNOWN_VIEWS] = result(0, 20)
    worst = results_report.worst_case(table)
    assert (worst.static.sum(), worst.defended.sum()) == (20, 15)
    assert (worst.attack, worst.defence) == (Cost(6, 1.5), Cost(9, 0.75))
