"""One epoch of training, one pass of evaluation, one pass of attack.

Each is a generator: it yields after every batch and leaves printing, saving and stopping to the
driver. Sums stay on the device until someone reads them, so that a step never waits for the last.
"""

from __future__ import annotations

import copy
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import MethodType

import torch
from torch import Tensor, nn

from deepvision.runtime import distributed, memory
from deepvision.training.objectives import Objective, standard
from utils import AverageMeter, UserError

try:
    import resource
except ImportError:  # Windows
    resource = None


@dataclass
class DeviceContext:
    """Where the arithmetic happens, and the number format and memory layout that are fast there.

    amp: what networks compute in where that is safe (torch.autocast); None keeps float32.
    """

    device: torch.device
    amp: torch.dtype | None = None
    memory_format: torch.memory_format = torch.channels_last

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32; convolutions have it by default
        if self.device.type == "cpu":
            memory.retain_freed_memory()

    def prepare_model(self, model: nn.Module, compiled: bool = False) -> nn.Module:
        """`model` itself, moved here; its parameters, their names and its logits stay float32."""
        model.to(self.device, memory_format=self.memory_format)
        if probe_backward(
            model, self.to_device_images(torch.zeros(1, 3, 128, 128))
        ):  # a student's may `view`
            self.memory_format = torch.contiguous_format
            model.to(memory_format=self.memory_format)
        if self.amp:
            forward = torch.autocast(self.device.type, self.amp)(type(model).forward)
            model.forward = MethodType(forward, model)  # a copy of the model gets its own
            model.register_forward_hook(lambda module, inputs, logits: logits.float())
            if reason := probe_backward(model, self.to_device_images(torch.zeros(1, 3, 128, 128))):
                raise UserError(
                    f"--amp: the network's own backward pass mixes formats ({reason}): leave it out"
                )
        if compiled:
            model.compile()
        return model

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps small gradients above zero in float16; does nothing in other formats."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)

    def to_device_images(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True, memory_format=self.memory_format)

    def to_device_labels(self, y: Tensor) -> Tensor:
        return y.to(self.device, non_blocking=True)

    def peak_memory(self) -> int | None:
        """The most bytes this process has held on a GPU, or in all; None where nothing tells."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if resource is None:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_name(device: torch.device) -> str:
    """For records: the GPU by its maker's name, or the kind of machine and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}), threads: {torch.get_num_threads()}"


def probe_backward(model: nn.Module, x: Tensor) -> str | None:
    """Why `model` does not go forward and back in the memory layout of x; None if it does."""
    trial = copy.deepcopy(model).eval()
    try:
        trial(x.requires_grad_(True)).sum().backward()
    except torch.OutOfMemoryError:  # of no layout's making
        raise
    except RuntimeError as e:
        return str(e).splitlines()[0]
    return None


class EpochMetrics:
    """Loss, top-1 and top-5 summed on the device; `read` is the only point that synchronises.

    It sums over all processes, which therefore have to read together.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, device=device)  # of loss, top-1 hits, top-5 hits, images
        self.last = torch.zeros(4, device=device)  # the latest batch's share of them
        self.finite = torch.zeros((), device=device)  # batches before the loss left the numbers

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor, loss: Tensor | None = None) -> None:
        """Count one batch: logits (N, K), target (N,), loss the batch's mean."""
        n, k = logits.shape
        hits = logits.topk(min(5, k)).indices == target[:, None]  # (N, 5)
        total = loss.detach() * n if loss is not None else logits.new_zeros(())
        shares = (total, hits[:, 0].sum(), hits.sum(), logits.new_full((), n))
        self.last = torch.stack([share.float() for share in shares])
        self.sums += self.last
        self.finite += self.sums[0].isfinite()  # a sum that was not finite once stays so

    def compute(self) -> tuple[Metrics, Metrics]:
        """The scores of the latest batch and of all batches so far."""
        last, sums = distributed.all_reduce_sum(torch.stack([self.last, self.sums])).tolist()
        return Metrics.of(*last), Metrics.of(*sums)

    def state_dict(self) -> list[float]:
        """For `restore`: the sums over all processes, and the batches before the first bad one."""
        return [*distributed.all_reduce_sum(self.sums.clone()).tolist(), self.finite_batches()]

    def finite_batches(self) -> int:
        return -distributed.all_reduce_max(-int(self.finite))

    def load_state_dict(self, state: list[float]) -> None:
        if distributed.is_main_process():
            self.sums = torch.tensor(state[:4], device=self.sums.device)
        self.finite = torch.tensor(state[4], device=self.sums.device)


@dataclass(frozen=True)
class Metrics:
    """A mean loss and two accuracies in per cent."""

    loss: float
    acc1: float
    acc5: float

    @classmethod
    def of(cls, loss: float, hits1: float, hits5: float, n: float) -> Metrics:
        n = max(n, 1)
        return cls(loss / n, 100 * hits1 / n, 100 * hits5 / n)


@dataclass
class StepTimer:
    """Seconds a step took, and how many of them it waited for data."""

    step: AverageMeter = field(default_factory=AverageMeter)
    data: AverageMeter = field(default_factory=AverageMeter)

    def __post_init__(self) -> None:
        self.start = time.perf_counter()

    def data_arrived(self) -> None:
        self.data.update(time.perf_counter() - self.start)

    def step_done(self) -> None:
        now = time.perf_counter()
        self.step.update(now - self.start)
        self.start = now


def train_epoch(
    model: nn.Module,
    batches: Iterable,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    place: DeviceContext,
    tally: EpochMetrics,
    clock: StepTimer,
    seed: int,
    clip_grad: float = 0.0,
    objective: Objective = standard,
    scaler: torch.amp.GradScaler | None = None,
) -> Iterator[float]:
    """Train on each batch and yield its learning rate.

    A batch is one step of the schedule, even if its objective is worth several of the optimizer's.
    Random numbers of a step (drop path, attacks) follow from `seed` and the scheduler's step count,
    so a resumed epoch draws what an uninterrupted one would have drawn.
    """
    scaler = scaler or place.scaler()
    model.train()
    for x, y in batches:
        clock.data_arrived()
        x, y = place.to_device_images(x), place.to_device_labels(y)
        step = scheduler.last_epoch
        torch.manual_seed(hash((seed, step)))
        for logits, loss in objective(model, criterion, x, y, step):  # noqa: B007
            optimizer.zero_grad()  # after an attack: none of its gradients may reach the step
            scaler.scale(loss).backward()
            if clip_grad > 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
            scaler.step(optimizer)
            scaler.update()
        rate = scheduler.get_last_lr()[0]
        scheduler.step()

        tally.update(logits, y, loss)
        clock.step_done()
        yield rate


def evaluate(
    model: nn.Module,
    batches: Iterable,
    place: DeviceContext,
    plain: EpochMetrics,
    clock: StepTimer,
    mirrored: EpochMetrics | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Count hits over all batches and yield each batch's images (N, C, H, W) and labels (N,).

    `mirrored` counts the hits of the logits averaged over an image and its mirror image.
    """
    model.eval()
    for x, y in batches:
        clock.data_arrived()
        x, y = place.to_device_images(x), place.to_device_labels(y)
        with torch.inference_mode():
            logits = model(x)
            plain.update(logits, y)
            if mirrored is not None:
                mirrored.update((logits + model(x.flip(3))) / 2, y)
        clock.step_done()
        yield x, y


def attack(
    model: nn.Module,
    batches: Iterable,
    perturb: Callable[[nn.Module, Tensor, Tensor], Tensor],
    place: DeviceContext,
    clean: EpochMetrics,
    adversarial: EpochMetrics,
    clock: StepTimer,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Attack every batch, count hits before and after, yield (images, attacked images, labels).

    perturb: (model, images, labels) -> attacked images; it may spoil what it is given.
    """
    model.eval()
    for x, y in batches:
        clock.data_arrived()
        x, y = place.to_device_images(x), place.to_device_labels(y)
        x_adv = perturb(model, x.clone(), y).detach()
        with torch.no_grad():
            clean.update(model(x), y)
            adversarial.update(model(x_adv), y)
        clock.step_done()
        yield x, x_adv, y
