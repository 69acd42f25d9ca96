"""How fast a network trains on the CPU: the course's loop beside ours.

    python benchmarks/train_step.py data/sample
    python benchmarks/train_step.py DATA --batch-size 32 --steps 2 --rounds 7

The course's: its transforms one by one (benchmarks/input.py), images as they come, attention
written out, `.item()` at every step. Ours: the fused input path, channels_last, the engine. All
load in the process that trains. Writes results/train_step_benchmark.{json,md}.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))

from input import COURSE, OURS, CourseImages, StepByStep  # noqa: E402
from side_by_side import Ways, Work, measure, options, write  # noqa: E402

from custom_dataloader import MiniPlacesLoader  # noqa: E402
from custom_transforms import Compose  # noqa: E402
from deepvision.data.loader import training_batches  # noqa: E402
from deepvision.training import engine  # noqa: E402
from deepvision.training.engine import DeviceContext, EpochMetrics, StepTimer  # noqa: E402
from student_code import Attention, default_cnn_model, default_vit_model  # noqa: E402
from utils import AverageMeter, LinearWarmupCosineAnnealingLR  # noqa: E402

NETWORKS = {"SimpleNet": default_cnn_model, "SimpleViT": default_vit_model}


class WrittenOut(Attention):
    """Attention as a student writes it: scores, softmax and sum, whatever the number of tokens."""

    def forward(self, x: Tensor, mask: None = None) -> Tensor:  # no window here is padded
        b, h, w, c = x.shape
        qkv = self.qkv(x).reshape(b, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, heads, N, C / heads)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, h, w, c))


def as_in_the_course(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Attention):
            module.__class__ = WrittenOut
    return model


def optimizer_and_schedule(model: nn.Module) -> tuple:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    return optimizer, LinearWarmupCosineAnnealingLR(optimizer, 100, 10_000)


def course_loop(model: nn.Module, loader: DataLoader, steps: int) -> Work:
    optimizer, scheduler = optimizer_and_schedule(as_in_the_course(model))
    criterion, losses, top1, top5 = nn.CrossEntropyLoss(), *(AverageMeter() for _ in range(3))

    def work() -> None:
        model.train()
        for x, y in islice(loader, steps):
            logits = model(x)
            loss = criterion(logits, y)
            hits = logits.topk(5, 1)[1].t().eq(y.view(1, -1))
            losses.update(loss.item(), len(x))
            top1.update(hits[:1].float().sum().item() * 100 / len(x), len(x))
            top5.update(hits.float().sum().item() * 100 / len(x), len(x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

    return work


def our_loop(
    model: nn.Module,
    loader: DataLoader,
    steps: int,
    clock: StepTimer,
    amp: torch.dtype | None = None,
) -> Work:
    place = DeviceContext(torch.device("cpu"), amp)
    optimizer, scheduler = optimizer_and_schedule(place.prepare_model(model))
    tally = EpochMetrics(place.device)

    def work() -> None:
        batches = islice(loader, steps)
        for _ in engine.train_epoch(
            model, batches, nn.CrossEntropyLoss(), optimizer, scheduler, place, tally, clock, 2024
        ):
            pass

    return work


def ways(name: str, args: argparse.Namespace) -> Ways:
    def data(transforms: Compose, kind: type) -> MiniPlacesLoader:
        return kind(args.data, num_classes=10_000, transforms=transforms)

    torch.manual_seed(0)
    theirs, ours = NETWORKS[name](num_classes=100), NETWORKS[name](num_classes=100)
    course_set = data(StepByStep(COURSE["train"]), CourseImages)
    course = DataLoader(course_set, args.batch_size, shuffle=True, drop_last=True)
    fused = training_batches(data(Compose(OURS["train"]), MiniPlacesLoader), args.batch_size, 1, 0)
    return {
        "course's loop": lambda: course_loop(theirs, course, args.steps),
        "ours": lambda: our_loop(ours, fused, args.steps, StepTimer()),
        "ours, --amp=bf16": lambda: our_loop(ours, fused, args.steps, StepTimer(), torch.bfloat16),
    }


def share_of_waiting(args: argparse.Namespace) -> float:
    """Of the wall-clock time of SimpleNet's training, with one worker, once it has started."""
    dataset = MiniPlacesLoader(args.data, num_classes=10_000, transforms=Compose(OURS["train"]))
    loader = training_batches(dataset, args.batch_size, 1, workers=1)
    model = default_cnn_model(num_classes=100)
    our_loop(model, loader, 1, StepTimer())()
    clock = StepTimer()
    our_loop(model, loader, 9, clock)()
    return clock.data.sum / clock.step.sum


def main() -> None:
    parser = options("Measure training steps on one core.", batch_size=32)
    parser.add_argument("data", type=Path, help="data folder in the MiniPlaces layout")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    args = parser.parse_args()
    images = args.steps * args.batch_size
    rows = measure(NETWORKS, lambda name: ways(name, args), args.rounds, images)
    note = "Medians of interleaved rounds, one thread; the ratio is taken within each round."
    waiting = share_of_waiting(args)
    note += f" Our loop with one worker waited for data {waiting:.1%} of its wall-clock time."
    write(
        "train_step_benchmark",
        "Training: the course's loop beside ours",
        note,
        rows,
        waiting=waiting,
    )


if __name__ == "__main__":
    main()
