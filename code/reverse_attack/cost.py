"""What an attack or a defence costs: forward passes and seconds per image."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Cost:
    """Per image: forward passes of the classifier, each view counted, and seconds."""

    forward: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.seconds + other.seconds)


def synchronized_time() -> float:
    """time.perf_counter() once the GPU, if one is in use, has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def measure_cost(model: nn.Module, images: int) -> Iterator[Cost]:
    """The cost of a block for each of its images, complete when the block ends."""
    cost, start = Cost(), synchronized_time()

    def count(_: nn.Module, inputs: tuple, logits: Tensor) -> None:
        cost.forward += len(logits) / images

    hook = model.register_forward_hook(count)
    try:
        yield cost
    finally:
        hook.remove()
        cost.seconds = (synchronized_time() - start) / images
