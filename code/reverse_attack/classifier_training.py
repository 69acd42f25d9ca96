"""Training of the classifier: standard, or adversarial (FGSM-RS: Wong et al., 2020)."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import nn

from deepvision import checkpoint
from deepvision.attacks import PGD, InputScale
from deepvision.runtime.console import Console
from deepvision.runtime.device import DeviceContext
from deepvision.runtime.meters import EpochMetrics, Metrics, StepTimer
from deepvision.runtime.run_dir import new_run_dir
from deepvision.runtime.run_logger import RunLogger
from deepvision.training import engine
from deepvision.training.objectives import STEPS, AdversarialTraining, Objective, Standard
from reverse_attack import options, resnets
from reverse_attack.classifier import Classifier, run_kind
from reverse_attack.data import AugmentedBatches, Images, list_images
from utils import relpath

SCALE = InputScale("255", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # epsilon in 1/255, images in [0, 1]
ROBUST_SUBSET = 500  # held-out images on which PGD-10 measures each epoch
HPARAMS = ("task", "arch", "at", "epsilon", "epochs", "batch_size", "lr", "optim")


def train_classifier(args: Namespace) -> None:
    """Train; save the epoch with the best held-out accuracy, under PGD-10 for --task Robust."""
    context = DeviceContext(args.device)
    index = list_images(args.dataset, args.data_root, "train")
    train, val = index.split(args.seed, args.limit)
    batches = AugmentedBatches(train, args.batch_size, args.seed)
    torch.manual_seed(args.seed)
    model = Classifier(resnets.build(args.arch, len(train.classes)), bf16=args.bf16)
    model = model.to(args.device)
    optimizer = make_optimizer(args.optim, model, args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, max(2, args.epochs * len(batches)), cycle_momentum=False
    )
    run_dir = new_run_dir(args.logs, run_kind(args.task, args.dataset, args.arch))
    print(f"Run: {relpath(run_dir)}")
    best = float("-inf")
    with RunLogger(run_dir) as logger:
        logger.log_config(options.record(args), {k: getattr(args, k) for k in HPARAMS})
        for epoch in range(args.epochs):
            batches.epoch = epoch
            metrics = train_one_epoch(model, batches, optimizer, scheduler, context, args, logger)
            clean, robust = evaluate(model, val, context, args.epsilon)
            logger.log_epoch(epoch + 1, metrics, clean, {"robust_top1_accuracy": robust.acc1})
            print(f"Held out: clean {clean.acc1:.2f} %, PGD-10 {robust.acc1:.2f} %", flush=True)
            accuracy = robust.acc1 if args.task == "Robust" else clean.acc1
            if accuracy > best:
                best = accuracy
                ckpt = make_ckpt(model, args, epoch + 1, clean, robust)
                checkpoint.save(run_dir / "models" / checkpoint.BEST, ckpt)
    print(f"Best on the held-out slice: {best:.2f} %")


def make_objective(args: Namespace) -> Objective:
    """The objective of --task: cross-entropy on clean batches, or adversarial training."""
    if args.task == "Clean":
        return Standard()
    return AdversarialTraining(
        mode=args.at, epsilon=args.epsilon, steps=STEPS[args.at], scale=SCALE
    )


def make_optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam, or SGD with momentum 0.9 and weight decay 5e-4."""
    if name == "Adam":
        return torch.optim.Adam(model.parameters(), lr)
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)


def train_one_epoch(
    model: nn.Module,
    batches: AugmentedBatches,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    context: DeviceContext,
    args: Namespace,
    logger: RunLogger,
) -> Metrics:
    """Train on each batch of the epoch `batches.epoch`; print and log every 50th."""
    metrics, timer, epoch = EpochMetrics(context.device), StepTimer(), batches.epoch
    with Console(len(batches), print_freq=50) as console:

        def after_step(lr: float) -> bool:
            i = timer.step.count - 1
            if console.advance(i):
                last, mean = metrics.compute()
                console.train_line(epoch + 1, i, timer, last, mean, batches.size)
                logger.log_step(epoch * len(batches) + i, last.loss, lr)
            return True

        engine.train_epoch(
            model,
            batches,
            make_objective(args),
            optimizer,
            scheduler,
            context,
            metrics,
            timer,
            seed=args.seed,
            after_step=after_step,
        )
    return metrics.compute()[1]


def evaluate(
    model: nn.Module, val: Images, context: DeviceContext, epsilon: float
) -> tuple[Metrics, Metrics]:
    """Clean metrics on the held-out images, and those under PGD-10 on the first of them."""
    clean, subset, robust = (EpochMetrics(context.device) for _ in range(3))
    engine.evaluate(model, val.batches(250), context, clean, StepTimer())
    pgd = PGD(epsilon=epsilon, steps=10, early_stop=True, pixels=SCALE)
    batches = val.take(slice(ROBUST_SUBSET)).batches(250)
    engine.evaluate_under_attack(model, batches, pgd.perturb, context, subset, robust, StepTimer())
    return clean.compute()[1], robust.compute()[1]


def make_ckpt(
    model: Classifier, args: Namespace, epoch: int, clean: Metrics, robust: Metrics
) -> dict:
    """The checkpoint of an epoch, counted from 1."""
    return {
        "epoch": epoch,
        "model_arch": args.arch,
        "state_dict": model.net.state_dict(),
        "best_acc1": clean.acc1,
        "robust_acc1": robust.acc1,
        "task": args.task,
        "dataset": args.dataset,
        "seed": args.seed,
    }
