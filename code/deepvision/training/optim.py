"""Optimizer, learning-rate schedule and moving average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from utils import LinearWarmupCosineAnnealingLR


def make_optimizer(
    model: nn.Module, kind: str, lr: float, wd: float, momentum: float, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW for the ViT, SGD with momentum for all other networks.

    fused: one kernel updates all parameters, which is fast on a GPU.
    """
    if kind == "vit":
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=wd, fused=fused)
    parameters = weight_decay_groups(model) if kind == "scene_net" else model.parameters()
    optimizer = torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=wd, fused=fused)
    if fused and momentum:
        # fused SGD leaves the buffer uninitialised if float16 overflows in the first step
        for p in model.parameters():
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def reset_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Set momentum and moments to zero."""
    for state in optimizer.state.values():
        for value in filter(torch.is_tensor, state.values()):
            value.zero_()


def weight_decay_groups(model: nn.Module) -> list[dict]:
    """Weight decay for matrices and kernels only, not for biases and normalisation parameters.

    He et al., 2019, "Bag of Tricks", section 3.1.
    """
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_scheduler(
    optimizer: torch.optim.Optimizer, lr: float, warmup: float, epochs: int, steps: int, done: int
) -> LinearWarmupCosineAnnealingLR:
    """Linear warmup over `warmup` epochs of `steps` steps, then a cosine to the last epoch.

    done: steps that the run has done. The schedule is a function of the step and needs nothing from
        a checkpoint.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = lr  # required by torch for a schedule that starts midway
    scheduler = LinearWarmupCosineAnnealingLR(
        optimizer, round(warmup * steps), epochs * steps, last_epoch=done - 1
    )
    scheduler._step_count = done + 1  # as if the run had never been interrupted
    return scheduler


class EMA:
    """The exponential moving average of a network's parameters and buffers, in `module`.

    A step's weight falls by the factor `decay` with each later step (Polyak & Juditsky, 1992;
    Tarvainen & Valpola, 2017, eq. 1). Integer buffers are copied. One call averages all tensors,
    and none waits for the device: torch's AveragedModel reads its step count from the device.

    steps: steps averaged so far; 0: `model` holds no average yet.
    """

    def __init__(self, model: nn.Module, decay: float, steps: int = 0) -> None:
        self.module, self.decay, self.steps = copy.deepcopy(model), decay, steps

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the state of `model` after a step into the average."""
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        others = [pair for pair in pairs if not pair[0].is_floating_point()]
        weight = 1 - self.decay if self.steps else 1.0  # the first step is copied
        torch._foreach_lerp_(*map(list, zip(*floats, strict=True)), weight)
        if others:
            torch._foreach_copy_(*map(list, zip(*others, strict=True)))
        self.steps += 1


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def make_ema(model: nn.Module, span: float, total_steps: int, done: int) -> EMA | None:
    """The average in which a step's weight falls to 1/e over the fraction `span` of the run.

    None for span = 0.
    done: steps that the run has done; `model` then holds an average already.
    """
    return EMA(model, max(0.0, 1 - 1 / (span * total_steps)), done) if span else None
