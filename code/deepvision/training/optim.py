"""What a network is trained with: flags left out, optimizer, schedule, objective, mean weights."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from custom_transforms import IMAGENET_MEAN, IMAGENET_STD
from deepvision.attacks.norms import InputScale
from deepvision.training.engine import DeviceContext
from deepvision.training.objectives import STEPS, AdversarialTraining, Losses, Objective, standard
from utils import LinearWarmupCosineAnnealingLR

DEFAULTS = {
    "lr": 0.1,
    "wd": 1e-4,
    "label_smoothing": 0.0,
    "cutmix": 0.0,
    "ema": 0.0,
}
SCENE_NET = {
    "lr": 0.2,
    "wd": 5e-4,
    "label_smoothing": 0.1,
    "cutmix": 0.5,
    "ema": 0.05,
}
RECIPES = {"scene_net": SCENE_NET}  # by kind of network; the others follow the course's


def resolve_defaults(args: Namespace, kind: str) -> None:
    """Give flags that were left out what the network's recipe says. Attacked batches stay whole."""
    values = RECIPES.get(kind, DEFAULTS)
    if args.at:
        values = values | {"cutmix": 0.0}
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def make_optimizer(
    args: Namespace, kind: str, model: nn.Module, place: DeviceContext
) -> torch.optim.Optimizer:
    fused = place.device.type == "cuda"  # one kernel for all parameters
    if kind == "vit":
        return torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.wd, fused=fused)
    parameters = weight_decay_groups(model) if kind == "scene_net" else model.parameters()
    optimizer = torch.optim.SGD(
        parameters, args.lr, momentum=args.momentum, weight_decay=args.wd, fused=fused
    )
    if fused and args.momentum:
        # torch takes memory as it comes, and leaves it so if float16 overflows in the first step
        for p in model.parameters():
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def reset_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Momentum and moments start at zero again."""
    for memory in optimizer.state.values():
        for value in filter(torch.is_tensor, memory.values()):
            value.zero_()


def weight_decay_groups(model: nn.Module) -> list[dict]:
    """Weight decay for matrices and kernels alone, not for biases, nor for what normalisation
    scales and shifts by (He et al., 2019, "Bag of Tricks", section 3.1)."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_scheduler(
    args: Namespace, optimizer: torch.optim.Optimizer, steps: int, done: int
) -> LinearWarmupCosineAnnealingLR:
    """The schedule for `steps` steps an epoch, of which the run has done `done` in all.

    It is a function of the step alone and takes nothing from a checkpoint.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = args.lr  # what torch wants of a schedule that starts midway
    return LinearWarmupCosineAnnealingLR(
        optimizer,
        round(args.warmup * steps),
        args.epochs * steps,
        last_epoch=done - 1,
    )


def make_adv_training(args: Namespace, total_steps: int) -> AdversarialTraining | None:
    """The mode of --at. From scratch, a quarter of the run is clean and epsilon full from 3/4 on;
    a network that begins with --weights is attacked at once, at full size after a quarter."""
    if args.at is None:
        return None
    quarter = total_steps // 4
    return AdversarialTraining(
        mode=args.at,
        epsilon=args.at_eps,
        steps=STEPS[args.at] if args.pgd_steps is None else args.pgd_steps,
        pixels=InputScale("255", IMAGENET_MEAN, IMAGENET_STD),
        prob=args.pgd_prob,
        blend=args.pgd_blend,
        ramp=(0, quarter) if args.weights else (quarter, 3 * quarter),
    )


def make_objective(
    args: Namespace, adversary: AdversarialTraining | None, num_classes: int
) -> Objective:
    if args.cutmix:
        return cutmix(num_classes, args.cutmix)
    return adversary or standard


def cutmix(num_classes: int, prob: float) -> Objective:
    """The objective of batches in which each image has a rectangle of its neighbour.

    Both labels count, by their share of the area (Yun et al., 2019, "CutMix", eq. 1 and 2).
    prob: the share of batches that are mixed; the others are trained on as they are.

    Random numbers come from torch's global generator: a batch's follow from its seed.
    """
    from torchvision.transforms.v2 import CutMix  # takes seconds: other runs need not wait

    mix = CutMix(num_classes=num_classes)

    def objective(
        model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, step: int
    ) -> Losses:
        if torch.rand(()) < prob:
            x, y = mix(x, y)  # y: (N,) -> (N, K)
        return standard(model, criterion, x, y)

    return objective


def make_ema(
    args: Namespace, model: nn.Module, total_steps: int, done: int
) -> AveragedModel | None:
    """The exponential moving average of `model` that --ema asks for, statistics included.

    A step's weight falls to 1/e over the share --ema of the run: short runs forget their start, too
    (Polyak & Juditsky, 1992; as a moving average in Tarvainen & Valpola, 2017, eq. 1).
    done: steps of the run so far, after which `model` already holds an average.
    """
    if not args.ema:
        return None
    decay = max(0.0, 1 - 1 / (args.ema * total_steps))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    average.n_averaged.fill_(done)
    return average
