"""Progress: what a run continues from, and what is refused."""

import pytest
import torch

from deepvision import checkpoint
from deepvision.training.progress import Progress
from utils import UserError

ORDER = {"-b": 16, "--seed": 1}
MIDDLE = {"position": 3, "tally": [1.0, 2.0, 3.0, 48.0, 3.0], "order": ORDER}


def test_an_epoch_in_progress_continues_in_the_same_order_only():
    ckpt = {"epoch": 2, "best_acc1": 7.5, "progress": MIDDLE}
    same, other = Progress(data_order=ORDER), Progress(data_order={"-b": 32, "--seed": 1})
    assert same.load_state_dict(ckpt) is None
    assert (same.epoch, same.batch_in_epoch, same.best_acc1) == (2, 3, 7.5)
    lost = other.load_state_dict(ckpt)
    assert (other.epoch, other.batch_in_epoch, other.metric_sums) == (2, 0, [])
    assert lost == "the file was saved in mid-epoch with other -b: epoch 3 starts over"


def test_a_saved_progress_comes_back():
    saved = Progress(2, 3, 7.5, 6.5, MIDDLE["tally"], 12.0, 40, ORDER)
    restored = Progress(data_order=ORDER)
    assert restored.load_state_dict(saved.state_dict()) is None
    assert restored == saved


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": "two"},
        {"epoch": -1},
        {"epoch": float("nan")},
        {"best_acc1": float("nan")},
        {"best_robust": float("nan")},
        {"best_robust": "high"},
        {"best_acc1": torch.zeros(3)},
        {"progress": [1]},
        {"progress": torch.tensor(1)},
        {"progress": {"position": 1}},
        {"progress": {**MIDDLE, "tally": [1.0]}},
        {"progress": {**MIDDLE, "order": None}},
        {"progress": {**MIDDLE, "position": -1}},
        {"progress": {**MIDDLE, "seconds": float("nan")}},
    ],
    ids=str,
)
def test_an_invalid_progress_is_refused(change):
    with pytest.raises(UserError, match="is invalid"), checkpoint.validated("progress"):
        Progress(data_order=ORDER).load_state_dict({"epoch": 2, **change})
