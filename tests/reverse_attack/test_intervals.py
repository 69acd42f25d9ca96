"""McNemar's test and paired counts."""

from __future__ import annotations

import itertools

import pytest
import torch

from reverse_attack.intervals import Paired, mcnemar


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
