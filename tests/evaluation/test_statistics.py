"""Confidence intervals against published ones, McNemar's test against enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch

from deepvision.evaluation.statistics import Paired, mcnemar, wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 20, 0.0, 16.11), (10, 20, 29.93, 70.07), (81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05)],
)
def test_wilson_intervals_are_the_published_ones(hits, n, low, high):
    """The last two: Newcombe, 1998, table I, method 3."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=0.01)


def test_mcnemar_counts_coin_tosses():
    for fixed, broken in itertools.product(range(6), repeat=2):
        n, gap = fixed + broken, abs(fixed - broken)
        tosses = itertools.product((0, 1), repeat=n)
        as_uneven = sum(abs(2 * sum(toss) - n) >= gap for toss in tosses) / 2**n
        assert mcnemar(fixed, broken) == pytest.approx(as_uneven)


def test_pairs_count_both_ways():
    before = torch.tensor([True, True, False, False, True])
    after = torch.tensor([True, False, True, True, True])
    paired = Paired.of(before, after)
    assert (paired.fixed, paired.broken, paired.gain) == (2, 1, pytest.approx(20.0))
