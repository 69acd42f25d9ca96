"""A trained network and images for it, made once per session."""

from __future__ import annotations

import pytest
import torch
from attack_toys import batch, train_net
from torch import nn


@pytest.fixture(scope="session")
def net() -> nn.Module:
    return train_net()


@pytest.fixture(scope="session")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return batch(64, 1000)
