"""Training of the classifier: plain, or on attacked batches (FGSM-RS: Wong et al., 2020)."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import nn

from deepvision import checkpoint
from deepvision.attacks.norms import InputScale
from deepvision.attacks.pgd import PGD, Attack
from deepvision.runtime.run_logger import Console, RunLogger, new_run
from deepvision.training import engine
from deepvision.training.engine import DeviceContext, EpochMetrics, Metrics, StepTimer
from deepvision.training.objectives import STEPS, AdversarialTraining, Objective, standard
from reverse_attack import classifier, data, resnets
from reverse_attack.classifier import Classifier
from reverse_attack.options import choose_device, write_config
from utils import relpath

LEVELS = InputScale("255", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
JUDGED = 500  # held-out images that PGD-10 attacks after each epoch


def train_classifier(args: Namespace) -> None:
    """Keeps the epoch that does best on the held-out slice: under PGD-10 if it is a robust one."""
    place = DeviceContext(choose_device(args.device))
    listing = data.list_images(args.dataset, args.data_root, "train")
    train, val = listing.split(args.seed, args.limit)
    batches = data.AugmentedBatches(train, args.batchsize, args.seed)
    torch.manual_seed(args.seed)
    model = Classifier(resnets.build(args.arch, len(train.classes)), bf16=args.bf16)
    model = model.to(place.device)
    optimizer = make_optimizer(args.optim, model, args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, max(2, args.epochs * len(batches)), cycle_momentum=False
    )
    judge = PGD(epsilon=args.epsilon, steps=10, early_stop=True, pixels=LEVELS)

    folder = new_run(classifier.kind(args.task, args.dataset, args.arch))
    print(f"Run: {relpath(folder)}")
    best = float("-inf")
    write_config(folder, args, place.device)
    with RunLogger(folder) as book:
        for epoch in range(args.epochs):
            batches.epoch = epoch
            scores = one_epoch(model, batches, optimizer, scheduler, place, args, epoch, book)
            clean = accuracy(model, val, place)
            attacked = accuracy(model, val.take(slice(JUDGED)), place, judge)
            book.log_epoch(epoch + 1, scores, clean, robust_top1_accuracy=attacked.acc1)
            print(f"Held out: clean {clean.acc1:.2f} %, PGD-10 {attacked.acc1:.2f} %", flush=True)
            judged = attacked.acc1 if args.task == "Robust" else clean.acc1
            if judged > best:
                best = judged
                content = content_of(model, args, epoch + 1, clean, attacked)
                checkpoint.save(folder / "models" / checkpoint.BEST, content)
    print(f"Best on the held-out slice: {best:.2f} %")


def objective_of(args: Namespace) -> Objective:
    """What each batch descends: its loss, or that of the attacked batch."""
    if args.task == "Clean":
        return standard
    return AdversarialTraining(
        mode=args.at, epsilon=args.epsilon, steps=STEPS[args.at], pixels=LEVELS
    )


def make_optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if name == "Adam":
        return torch.optim.Adam(model.parameters(), lr)
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)


def one_epoch(
    model: nn.Module,
    batches: data.AugmentedBatches,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    place: DeviceContext,
    args: Namespace,
    epoch: int,
    book: RunLogger,
) -> Metrics:
    tally, clock, criterion = EpochMetrics(place.device), StepTimer(), nn.CrossEntropyLoss()
    steps = engine.train_epoch(
        model,
        batches,
        criterion,
        optimizer,
        scheduler,
        place,
        tally,
        clock,
        args.seed,
        objective=objective_of(args),
    )
    with Console(len(batches), print_freq=50) as console:
        for i, rate in enumerate(steps):
            if console.step(i):
                last, mean = tally.compute()
                console.train_line(epoch + 1, i, clock, last, mean, batches.size)
                book.log_step(epoch * len(batches) + i, last.loss, rate)
    return tally.compute()[1]


def accuracy(
    model: nn.Module, images: data.Images, place: DeviceContext, attack: Attack | None = None
) -> Metrics:
    """On these images, or on what the attack makes of them."""
    tally = EpochMetrics(place.device)
    model.eval()
    for x, y in images.batches(250):
        x, y = place.to_device_images(x), place.to_device_labels(y)
        if attack is not None:
            x = attack.perturb(model, x, y)
        with torch.no_grad():
            tally.update(model(x), y)
    return tally.compute()[1]


def content_of(
    model: Classifier, args: Namespace, epoch: int, clean: Metrics, attacked: Metrics
) -> dict:
    return {
        "epoch": epoch,
        "model_arch": args.arch,
        "state_dict": model.net.state_dict(),
        "best_acc1": clean.acc1,
        "robust_acc1": attacked.acc1,
        "task": args.task,
        "dataset": args.dataset,
        "seed": args.seed,
    }
