"""The guard against catastrophic overfitting: when it acts, what it restores, what it refuses."""

import pytest
import torch
from small_network import make_network

from deepvision import checkpoint
from deepvision.training.overfitting_guard import CatastrophicOverfittingGuard
from utils import UserError


def test_a_collapse_restores_the_last_good_weights():
    model, guard = make_network(), CatastrophicOverfittingGuard(chance=10)
    found = []
    for epoch, robust in enumerate([12, 3, 20, 30, 16, 4, 29], start=1):
        with torch.no_grad():
            model[0].weight.fill_(epoch)
        collapsed = guard.check_and_restore(model, robust, epoch)
        found.append((collapsed, model[0].weight.mean().item()))
    assert found == [
        (False, 1),
        (False, 2),  # a fall from chance does not count
        (False, 3),
        (False, 4),
        (False, 5),  # more than half of 30
        (True, 5),
        (False, 7),
    ]


def test_a_restored_guard_continues_as_it_was():
    saved, restored = (CatastrophicOverfittingGuard(10.0) for _ in range(2))
    model = make_network()
    assert not saved.check_and_restore(model, 40.0, 3)
    restored.load_state_dict(saved.state_dict(), model)
    assert (restored.best, restored.epoch) == (40.0, 3)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight.zero_()
    assert restored.check_and_restore(model, 4.0, 4)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


GOOD = CatastrophicOverfittingGuard(10.0, 40.0, 2, make_network().state_dict()).state_dict()


@pytest.mark.parametrize(
    "bad",
    [
        5,
        [],
        {**GOOD, "best": "high"},
        {**GOOD, "best": float("nan")},
        {**GOOD, "epoch": None},
        {**GOOD, "weights": {}},
        {**GOOD, "weights": {**GOOD["weights"], "0.weight": torch.full((8, 3, 3, 3), torch.nan)}},
    ],
    ids=lambda bad: str(bad)[:30],
)
def test_an_invalid_state_is_one_line(bad):
    with (
        pytest.raises(UserError, match="the checkpoint's watchdog is invalid"),
        checkpoint.validated("watchdog"),
    ):
        CatastrophicOverfittingGuard(10.0).load_state_dict(bad, make_network())
