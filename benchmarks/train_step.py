"""Measure training on the CPU: a loop as in the course, and this project's engine.

    python benchmarks/train_step.py data/sample
    python benchmarks/train_step.py DATA --batch-size 32 --steps 2 --rounds 7

The course loop: separate transforms (benchmarks/input.py), NCHW layout, attention with explicit
scores, `.item()` at every step. Ours: fused transforms, channels-last layout, the engine. Both load
the images in the training process. Another's convolution and ViT are those of
tests/course/student_answer.py, unchanged. Writes results/train_step_benchmark.{json,md}.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in main.py, before torch starts

import torch
from input import COURSE, OURS, CourseImages, StepByStep
from results_file import ROOT
from side_by_side import TIMES, Variants, Work, beside, make_parser, measure, write
from torch import Tensor, nn
from torch.utils.data import DataLoader

from custom_blocks import PatchEmbed
from custom_dataloader import MiniPlacesLoader
from custom_transforms import Compose
from deepvision.data.loader import training_batches
from deepvision.runtime.device import configure_backend, prepare_model
from deepvision.runtime.meters import EpochMetrics, StepTimer
from deepvision.runtime.provenance import command_line
from deepvision.training.engine import train_epoch
from deepvision.training.objectives import Standard
from student_code import Attention, default_cnn_model, default_vit_model
from utils import AverageMeter, LinearWarmupCosineAnnealingLR

sys.path.append(str(ROOT / "tests" / "course"))
import student_answer  # noqa: E402

NETWORKS = {
    "SimpleNet": default_cnn_model,
    "SimpleViT": default_vit_model,
    "another's CustomConv2d": partial(default_cnn_model, conv_op=student_answer.CustomConv2d),
    "another's ViT": partial(student_answer.SimpleViT, patch_size=16, embed_dim=192),
}
CPU = torch.device("cpu")


class ExplicitAttention(Attention):
    """Attention as students write it: scores, softmax and weighted sum, for any token count."""

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); there is no mask, as no window here is padded."""
        b, h, w, c = x.shape
        qkv = self.qkv(x).reshape(b, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, heads, N, C / heads)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, h, w, c))


class ConvolvedPatches(PatchEmbed):
    """Patch embedding as in the course: a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, H', W', embed_dim)."""
        return self.proj(x).permute(0, 2, 3, 1)


def course_blocks(model: nn.Module) -> nn.Module:
    """`model` itself, with the course's attention and patch embedding in place of ours."""
    theirs = {Attention: ExplicitAttention, PatchEmbed: ConvolvedPatches}
    for module in model.modules():
        module.__class__ = theirs.get(type(module), type(module))
    return model


def optimizer_and_scheduler(
    model: nn.Module,
) -> tuple[torch.optim.Optimizer, LinearWarmupCosineAnnealingLR]:
    """SGD with momentum; linear warmup, then a cosine."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    return optimizer, LinearWarmupCosineAnnealingLR(optimizer, 100, 10_000)


def course_loop(model: nn.Module, loader: DataLoader, steps: int) -> Work:
    """Training steps as in the course."""
    optimizer, scheduler = optimizer_and_scheduler(course_blocks(model))
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
    model: nn.Module, loader: DataLoader, steps: int, timer: StepTimer, amp: str = "off"
) -> Work:
    """Training steps by main.py's engine, with backend and network as main.py prepares them."""
    configure_backend(CPU)
    model, context = prepare_model(model, CPU, amp)
    optimizer, scheduler = optimizer_and_scheduler(model)
    metrics, objective = EpochMetrics(CPU), Standard()

    def work() -> None:
        batches = islice(loader, steps)
        train_epoch(
            model, batches, objective, optimizer, scheduler, context, metrics, timer, seed=2024
        )

    return work


def variants(name: str, args: argparse.Namespace) -> Variants:
    """The loops on one network, all with the same images."""

    def dataset(transforms: Compose, kind: type) -> MiniPlacesLoader:
        return kind(args.data, num_classes=10_000, transforms=transforms)

    torch.manual_seed(0)
    course_net, our_net = NETWORKS[name](num_classes=100), NETWORKS[name](num_classes=100)
    course_set = dataset(StepByStep(COURSE["train"]), CourseImages)
    course = DataLoader(course_set, args.batch_size, shuffle=True, drop_last=True)
    our_set = dataset(Compose(OURS["train"]), MiniPlacesLoader)
    ours = training_batches(our_set, args.batch_size, seed=1, workers=0)
    return {
        "course loop": lambda: course_loop(course_net, course, args.steps),
        "ours": lambda: our_loop(our_net, ours, args.steps, StepTimer()),
        "ours, --amp=bf16": lambda: our_loop(our_net, ours, args.steps, StepTimer(), "bf16"),
    }


def data_wait(args: argparse.Namespace) -> float:
    """The fraction of wall time that SimpleNet's training waits for data, with one worker."""
    dataset = MiniPlacesLoader(args.data, num_classes=10_000, transforms=Compose(OURS["train"]))
    loader = training_batches(dataset, args.batch_size, seed=1, workers=1)
    model = default_cnn_model(num_classes=100)
    our_loop(model, loader, 1, StepTimer())()  # starts the worker
    timer = StepTimer()
    our_loop(model, loader, 9, timer)()
    return timer.data.sum / timer.step.sum


def main(argv: Sequence[str]) -> None:
    """Measure and write the results."""
    parser = make_parser(__doc__, batch_size=32)
    parser.add_argument("data", type=Path, help="data folder in the MiniPlaces layout")
    parser.add_argument("--steps", type=int, default=2, help="steps per round")
    args = parser.parse_args(argv[1:])
    images, command = args.steps * args.batch_size, command_line(argv)
    rows = measure(NETWORKS, lambda name: variants(name, args), args.rounds, images)
    wait = data_wait(args)
    each = beside(variants("SimpleNet", args)["ours"], args.rounds)
    note = (
        f"{TIMES} Our loop with one worker waited for data {wait:.1%} of its wall time. Two of our "
        f"loops at once, with two threads each, ran at {each:.2f} of the speed of one alone."
    )
    title = "Training: course loop and ours"
    write("train_step_benchmark", title, note, rows, command, data_wait=wait, two_at_once=each)


if __name__ == "__main__":
    main(sys.argv)
