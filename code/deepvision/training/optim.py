"""Optimizer, learning-rate schedule and moving average of the weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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


def make_ema(model: nn.Module, span: float, total_steps: int, done: int) -> AveragedModel | None:
    """The exponential moving average of `model`, buffers included; None for span = 0.

    A step's weight falls to 1/e over the fraction `span` of the run (Polyak & Juditsky, 1992;
    Tarvainen & Valpola, 2017, eq. 1).
    done: steps that the run has done; `model` then holds an average already.
    """
    if not span:
        return None
    decay = max(0.0, 1 - 1 / (span * total_steps))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    ema.n_averaged.fill_(done)
    return ema
