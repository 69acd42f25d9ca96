"""Confidence intervals against published ones."""

from __future__ import annotations

import pytest

from deepvision.evaluation.statistics import wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 20, 0.0, 16.11), (10, 20, 29.93, 70.07), (81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05)],
)
def test_wilson_intervals_are_the_published_ones(hits, n, low, high):
    """The last two: Newcombe, 1998, table I, method 3."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=0.01)
