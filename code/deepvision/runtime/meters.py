"""Running loss, accuracy and step times."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepvision.runtime import distributed
from utils import AverageMeter


@dataclass(frozen=True)
class Metrics:
    """Mean loss, and top-1 and top-5 accuracy in per cent."""

    loss: float
    acc1: float
    acc5: float

    @classmethod
    def from_sums(cls, loss: float, correct1: float, correct5: float, n: float) -> Metrics:
        """From sums over n images; all zero for n = 0."""
        n = max(n, 1)
        return cls(loss / n, 100 * correct1 / n, 100 * correct5 / n)


class EpochMetrics:
    """Loss, top-1 and top-5 summed on the device, so that no step waits for it.

    `compute` is the only point that synchronises. It sums over all processes, so all of them have
    to call it together.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, device=device)  # loss, top-1 correct, top-5 correct, images
        self.last = torch.zeros(4, device=device)  # the same of the last batch
        self.finite = torch.zeros((), device=device)  # batches before the loss became non-finite

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor, loss: Tensor | None = None) -> None:
        """Add one batch: logits (N, K), target (N,), loss: the mean over the batch."""
        n, k = logits.shape
        correct = logits.topk(min(5, k)).indices == target[:, None]  # (N, 5)
        total = loss.detach() * n if loss is not None else logits.new_zeros(())
        parts = (total, correct[:, 0].sum(), correct.sum(), logits.new_full((), n))
        self.last = torch.stack([part.float() for part in parts])
        self.sums += self.last
        self.finite += self.sums[0].isfinite()  # a sum stays non-finite

    def compute(self) -> tuple[Metrics, Metrics]:
        """Metrics of the last batch and of all batches so far."""
        sums = distributed.all_reduce_sum(torch.stack([self.last, self.sums])).tolist()
        return Metrics.from_sums(*sums[0]), Metrics.from_sums(*sums[1])

    def finite_batches(self) -> int:
        """Batches before the loss became non-finite, in the process where that came first."""
        return -distributed.all_reduce_max(-int(self.finite))

    def state_dict(self) -> list[float]:
        """The sums over all processes and the number of finite batches."""
        return [*distributed.all_reduce_sum(self.sums.clone()).tolist(), self.finite_batches()]

    def load_state_dict(self, state: list[float]) -> None:
        """Continue from `state`; rank 0 takes the sums of all processes."""
        if distributed.is_main_process():
            self.sums = torch.tensor(state[:4], device=self.sums.device)
        self.finite = torch.tensor(state[4], device=self.sums.device)


@dataclass
class StepTimer:
    """Seconds of each step, and of the wait for data within it."""

    step: AverageMeter = field(default_factory=AverageMeter)
    data: AverageMeter = field(default_factory=AverageMeter)

    def __post_init__(self) -> None:
        self.start = time.perf_counter()

    def data_ready(self) -> None:
        """Record the wait for the batch that has just arrived."""
        self.data.update(time.perf_counter() - self.start)

    def step_done(self) -> None:
        """Record the step that has just ended and start the next."""
        now = time.perf_counter()
        self.step.update(now - self.start)
        self.start = now
