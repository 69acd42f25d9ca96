"""One epoch of training, one pass of evaluation, one pass under attack.

Each loop calls back after every batch: printing, saving and stopping are the caller's. Metrics stay
on the device until the caller reads them, so that a step never waits for the previous one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from deepvision.runtime import distributed
from deepvision.runtime.device import DeviceContext
from deepvision.runtime.meters import EpochMetrics, StepTimer
from deepvision.training.objectives import Objective
from deepvision.training.optim import EMA


def train_epoch(
    model: nn.Module,
    batches: Iterable,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    context: DeviceContext,
    metrics: EpochMetrics,
    timer: StepTimer,
    *,
    seed: int,
    clip_grad: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
    ema: EMA | None = None,
    after_step: Callable[[float], bool] = lambda lr: True,
) -> None:
    """Train on each batch until `after_step(learning rate)` returns False.

    A batch is one step of the schedule, even if its objective takes several optimizer steps.
    Random numbers of a step (drop path, attacks) follow from (seed, step), so that a resumed epoch
    draws what an uninterrupted one would have drawn.
    """
    scaler = scaler or context.grad_scaler()
    model.train()
    for x, y in batches:
        timer.data_ready()
        x, y = context.to_device(x, y)
        for _ in range(begin_batch(objective, seed, scheduler.last_epoch)):  # 1, or replays (free)
            logits, loss = objective(model, x, y)  # attacks the batch first, if it is adversarial
            optimizer.zero_grad()  # after the attack: none of its gradients may reach the step
            scaler.scale(loss).backward()
            if clip_grad > 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
            scaler.step(optimizer)
            scaler.update()
        lr = scheduler.get_last_lr()[0]
        scheduler.step()
        metrics.update(logits, y, loss)
        if ema is not None:
            ema.update(model)
        timer.step_done()
        if not after_step(lr):
            return


def begin_batch(objective: Objective, seed: int, step: int) -> int:
    """Seed a step's random numbers, prepare the objective; return its optimizer steps.

    The choices for the whole batch are common to all ranks, the noise of single samples is not.
    """
    torch.manual_seed(step_seed(seed, step))
    steps = objective.begin_batch(step)
    if distributed.world_size() > 1:
        torch.manual_seed(step_seed(seed, step, distributed.rank_slice().start))
    return steps


def step_seed(seed: int, step: int, *rank: int) -> int:
    """The seed of a training step's random numbers, common to all ranks or of one."""
    sequence = np.random.SeedSequence((seed, step), spawn_key=rank)
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def evaluate(
    model: nn.Module,
    batches: Iterable,
    context: DeviceContext,
    metrics: EpochMetrics,
    timer: StepTimer,
    flip_tta: EpochMetrics | None = None,
    after_batch: Callable[[Tensor, Tensor], bool] = lambda x, y: True,
) -> bool:
    """Measure accuracy; False if `after_batch(images, labels)` returned False and ended the pass.

    flip_tta: the metrics of logits averaged over an image and its mirror image.
    """
    model.eval()
    for x, y in batches:
        timer.data_ready()
        x, y = context.to_device(x, y)
        with torch.inference_mode():
            logits = model(x)
            metrics.update(logits, y)
            if flip_tta is not None:
                flip_tta.update((logits + model(x.flip(3))) / 2, y)
        timer.step_done()
        if not after_batch(x, y):
            return False
    return True


def evaluate_under_attack(
    model: nn.Module,
    batches: Iterable,
    perturb: Callable[[nn.Module, Tensor, Tensor], Tensor],
    context: DeviceContext,
    clean: EpochMetrics,
    adversarial: EpochMetrics,
    timer: StepTimer,
    after_batch: Callable[[Tensor, Tensor, Tensor], None] = lambda x, x_adv, y: None,
) -> None:
    """Attack every batch; measure accuracy before and after.

    perturb: (model, images, labels) -> attacked images; it may modify what it is given.
    after_batch: called with images (N, C, H, W), attacked images and labels (N,).
    """
    model.eval()
    for x, y in batches:
        timer.data_ready()
        x, y = context.to_device(x, y)
        x_adv = perturb(model, x.clone(), y).detach()
        with torch.no_grad():
            clean.update(model(x), y)
            adversarial.update(model(x_adv), y)
        timer.step_done()
        after_batch(x, x_adv, y)
