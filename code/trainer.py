"""A whole training run: what it is made of, its epochs, its saves, its end."""

from __future__ import annotations

import math
import os
import shlex
import sys
from argparse import Namespace
from dataclasses import asdict

import torch
from torch import nn
from torch.utils.data import Dataset

import checkpoint
import engine
import logbook
from attacks import PGD
from checkpoint import Progress, SavePoint
from custom_dataloader import training_batches, validation_batches
from custom_transforms import IMAGENET_MEAN, IMAGENET_STD
from engine import AdversarialTraining, Clock, Place, Scores, Tally
from geometry import Pixels
from logbook import Console, Logbook
from utils import LinearWarmupCosineAnnealingLR, UserError

ARCHITECTURES = {"torch_conv": "simplenet", "custom_conv": "simplenet"}  # the course's names
TRAINING_EPSILON = 0.1  # normalised units, as the default attack's


class Trainer:
    """One run, new or resumed from a checkpoint's content."""

    def __init__(
        self,
        args: Namespace,
        kind: str,
        model: nn.Module,
        content: dict,
        train_set: Dataset,
        val_set: Dataset,
        place: Place,
    ) -> None:
        self.args, self.kind, self.model, self.place = args, kind, model, place
        pin = place.device.type == "cuda"
        self.batches = training_batches(train_set, args.batch_size, args.seed, args.workers, pin)
        self.val_batches = validation_batches(val_set, args.workers, pin)
        self.optimizer = make_optimizer(args, kind, model)
        self.progress = Progress(args.start_epoch, batch_size=args.batch_size)
        if content:
            self.progress, lost = checkpoint.progress_of(content, args.batch_size)
            for line in filter(None, (lost, checkpoint.load_optimizer(self.optimizer, content))):
                print(f"Resuming: {line}.")
        self.scheduler = make_schedule(args, self.optimizer, len(self.batches), self.progress)
        self.adversary = make_adversary(args, args.epochs * len(self.batches))
        self.resumed_from = args.resume if content else None

    def train(self) -> int:
        """Train to args.epochs; return the exit code, 128 + the signal if one stopped the run."""
        args, progress = self.args, self.progress
        if progress.epoch >= args.epochs:
            print(f"This run has done {progress.epoch} epochs: raise --epochs to go on.")
            return 0
        own = logbook.run_of(self.resumed_from) if self.resumed_from else None
        self.folder = own or logbook.new_run(self.kind)
        print(f"Logs and checkpoints: {os.path.relpath(self.folder)}")
        with (
            Logbook(self.folder, self.scheduler.last_epoch, progress.epoch) as self.book,
            SavePoint(args.save_every) as self.point,
        ):
            self.book.config(
                {"kind": self.kind, "device": str(self.place.device), "arguments": vars(args)}
            )
            while progress.epoch < args.epochs:
                scores, clock = self._train_epoch()
                if self.point.stopped_by:
                    return self._report_stop()
                self._finish_epoch(scores, clock)
        return 0

    def _train_epoch(self) -> tuple[Scores, Clock]:
        """Train to the end of the epoch, or to the step after which a stop was asked for."""
        progress, first = self.progress, self.progress.position
        tally, clock = Tally(self.place.device), Clock()
        if progress.tally:
            tally.restore(progress.tally)
        self.batches.batch_sampler.set_position(progress.epoch, first)
        steps = engine.train_epoch(
            self.model,
            self.batches,
            nn.CrossEntropyLoss(),
            self.optimizer,
            self.scheduler,
            self.place,
            tally,
            clock,
            seed=self.args.seed,
            clip_grad=self.args.clip_grad if self.kind == "vit" else 0.0,
            adversary=self.adversary,
        )
        with Console(len(self.batches), self.args.print_freq, first) as console:
            for i, rate in enumerate(steps, first):
                progress.position = i + 1
                if console.step(i):
                    last, mean = tally.read()
                    self._check_finite(mean.loss, rate)
                    console.train_line(
                        progress.epoch + 1, i, clock, last, mean, self.args.batch_size
                    )
                    self.book.step(self.scheduler.last_epoch - 1, last.loss, rate)
                if self.point.due():
                    self._check_finite(tally.read()[1].loss, rate)
                    progress.tally = tally.state()
                    self._save_last()
                    if self.point.stopped_by:
                        break
        scores = tally.read()[1]
        self._check_finite(scores.loss, self.scheduler.get_last_lr()[0])
        return scores, clock

    def _finish_epoch(self, train: Scores, clock: Clock) -> None:
        """Validate, record, save. In this order a kill in between only repeats the rest."""
        progress = self.progress
        val = validate(self.model, self.val_batches, self.place, self.args.print_freq)
        print(logbook.final_line(val))
        progress.epoch, progress.position, progress.tally = progress.epoch + 1, 0, {}
        self.book.epoch(
            progress.epoch,
            train,
            val,
            learning_rate=self.scheduler.get_last_lr()[0],
            images_per_second=self.args.batch_size / max(clock.step.avg, 1e-9),
        )
        if val.acc1 > progress.best_acc1:
            progress.best_acc1 = val.acc1
            checkpoint.save(self.folder / "models" / checkpoint.BEST, self._content())
        self._save_last()

    def _content(self) -> dict:
        return {
            "epoch": self.progress.epoch,
            "model_arch": ARCHITECTURES.get(self.kind, self.kind),
            "kind": self.kind,
            "state_dict": self.model.state_dict(),
            "best_acc1": self.progress.best_acc1,
        }

    def _save_last(self) -> None:
        memory = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "progress": asdict(self.progress),
        }
        self.book.flush()
        checkpoint.save(self.folder / "models" / checkpoint.LAST, {**self._content(), **memory})
        self.point.saved()

    def _check_finite(self, loss: float, rate: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} in epoch {self.progress.epoch + 1}, by step "
                f"{self.progress.position} (learning rate {rate:.3g}): try a lower --lr; "
                f"the last good checkpoint is in {os.path.relpath(self.folder / 'models')}"
            )

    def _report_stop(self) -> int:
        last = os.path.relpath(self.folder / "models" / checkpoint.LAST)
        words = [w for w in sys.argv if not w.startswith("--resume=")]
        if "--resume" in words:
            del words[words.index("--resume") :][:2]
        print(f"Stopped and saved. Go on with:\n  python {shlex.join(words)} --resume={last}")
        return 128 + self.point.stopped_by


def make_optimizer(args: Namespace, kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "vit":
        return torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.wd)
    return torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.wd
    )


def make_schedule(
    args: Namespace, optimizer: torch.optim.Optimizer, steps: int, progress: Progress
) -> LinearWarmupCosineAnnealingLR:
    """The schedule for `steps` steps an epoch, at the step that the run has come to.

    It is a function of the step alone and takes nothing from a checkpoint.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = args.lr  # what torch wants of a schedule that starts midway
    return LinearWarmupCosineAnnealingLR(
        optimizer,
        round(args.warmup * steps),
        args.epochs * steps,
        last_epoch=progress.epoch * steps + progress.position - 1,
    )


def make_adversary(args: Namespace, total_steps: int) -> AdversarialTraining | None:
    """The --pgd mode: untargeted PGD whose budget grows over the first half of the run."""
    if not args.pgd:
        return None
    pixels = Pixels("normalised", IMAGENET_MEAN, IMAGENET_STD)
    attack = PGD(epsilon=TRAINING_EPSILON, steps=args.pgd_steps, random_start=True, pixels=pixels)
    return AdversarialTraining(attack, args.pgd_prob, args.pgd_blend, total_steps // 2)


def validate(model: nn.Module, batches, place: Place, print_freq: int) -> Scores:
    """Plain accuracy over the validation set."""
    tally, clock = Tally(place.device), Clock()
    with Console(len(batches), print_freq) as console:
        for i, _ in enumerate(engine.evaluate(model, batches, place, tally, clock)):
            if console.step(i):
                console.test_line(i, clock, *tally.read())
    return tally.read()[1]
