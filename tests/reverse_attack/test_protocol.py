"""The evaluation: the same images and seeds everywhere, and its attacks."""

from __future__ import annotations

import dataclasses

import torch
from reverse_toys import TINY, images, make_loss

from reverse_attack.protocol import BPDA, KNOWN_VIEWS, PROTOCOLS, Evaluator


def test_the_same_predictions_are_compared_in_every_cell():
    """Two evaluations of the same images give the same predictions."""
    loss, x = make_loss(), images()
    budget = dataclasses.replace(PROTOCOLS["quick"], n=4, n_adaptive=2, short=(2, 2))
    y = loss.classifier(x).argmax(1)
    evaluator = Evaluator(loss.classifier, loss, loss, x, y, budget, 8.0, 2, seed=0)
    reversal = evaluator.reversal(budget.short)
    assert reversal.radius == 16.0 and reversal.loss.n_views == 2
    attacked = x, None
    first, second = evaluator.evaluate(attacked, reversal), evaluator.evaluate(attacked, reversal)
    assert torch.equal(first.defended, second.defended) and first.static.all()
    with torch.no_grad():
        expected = [reversal(x[i : i + 2], i) for i in (0, 2)]
        predictions = torch.cat([loss.classifier(v).argmax(1) for v in expected])
    assert torch.equal(first.defended, predictions == y)


def make_evaluator(**changes) -> Evaluator:
    loss, x = make_loss(), images()
    y = loss.classifier(x).argmax(1)
    budget = dataclasses.replace(TINY, n=4, n_adaptive=4, **changes)
    return Evaluator(loss.classifier, loss, make_loss(seed=1), x, y, budget, 8.0, 3, seed=5)


def test_full_adds_dlr_and_deterministic_bpda_and_has_eot_20():
    rows = make_evaluator(dlr=True, known_views=True).run()[2]
    assert {"APGD-DLR", "PGD-CE"} <= rows.keys()
    for row in ("PGD-CE", "PGD-margin", "APGD-CE", "APGD-DLR"):
        assert {BPDA, KNOWN_VIEWS} <= rows[row].keys()
    quick = make_evaluator().run()[2]
    assert "APGD-DLR" not in quick and KNOWN_VIEWS not in quick["PGD-CE"]
    full = PROTOCOLS["full"]
    assert (full.draws, full.dlr, full.known_views) == (20, True, True)


def test_known_views_are_those_that_the_evaluation_draws():
    """Also in the second batch, whose seed differs."""
    evaluator = make_evaluator()
    reversal = evaluator.reversal((2, 2))
    log_p = evaluator.in_batches(
        lambda part, seed: evaluator.known_views(reversal)(seed)(evaluator.x[part]), 4
    )
    after = evaluator.in_batches(lambda part, seed: reversal(evaluator.x[part], seed), 4)
    with torch.no_grad():
        expected = evaluator.model(after).log_softmax(1)
    torch.testing.assert_close(log_p.detach(), expected)
