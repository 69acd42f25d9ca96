"""The moving average of the weights: torch's own, without its wait for the device."""

from __future__ import annotations

import pytest
import torch
from small_network import make_network
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deepvision.training.optim import EMA


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_average_is_that_of_averaged_model_to_the_bit(layout):
    model = make_network().to(memory_format=layout)
    ours = EMA(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(20):
        model(torch.randn(4, 3, 9, 9))  # moves the statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update(model)
        theirs.update_parameters(model)
    expected = theirs.module.state_dict()
    for name, value in ours.module.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, expected[name]), name
        else:
            assert torch.equal(value, model.state_dict()[name])  # a count is no average


def test_the_average_reads_nothing_from_the_device():
    """A tensor on "meta" has no values: to wait for one fails."""
    model = make_network().to("meta")
    ema = EMA(model, 0.9)
    for _ in range(2):
        ema.update(model)
    assert ema.steps == 2
