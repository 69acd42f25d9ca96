"""A whole training run: what it is made of, its epochs, its saves, its end."""

from __future__ import annotations

import math
import shlex
import sys
import time
import zlib
from argparse import Namespace

import torch
from torch import nn
from torch.utils.data import Dataset

from deepvision import checkpoint
from deepvision.attacks.pgd import PGD
from deepvision.checkpoint import Progress
from deepvision.data.loader import fixed_subset_batch, training_batches, validation_batches
from deepvision.runtime import distributed, run_logger
from deepvision.runtime.run_logger import Console
from deepvision.training import engine, optim
from deepvision.training.engine import DeviceContext, EpochMetrics, Metrics, StepTimer
from deepvision.training.objectives import CatastrophicOverfittingGuard, robust_accuracy
from deepvision.training.signals import SavePoint
from utils import UserError, relpath

ARCHITECTURES = {"torch_conv": "simplenet", "custom_conv": "simplenet"}  # the course's names
IN_EPOCH = ("position", "tally", "seconds", "order")  # what a checkpoint says of an epoch under way
HELD_OUT = 200  # validation images that the robust accuracy of each epoch is measured on


class Trainer:
    """One run, new or resumed from a checkpoint's content.

    model: what is trained
    network: what is validated and saved as the best: `model`, or the mean of its weights (--ema)
    """

    def __init__(
        self,
        args: Namespace,
        kind: str,
        model: nn.Module,
        content: dict,
        train_set: Dataset,
        val_set: Dataset,
        place: DeviceContext,
    ) -> None:
        self.args, self.kind, self.model, self.place = args, kind, model, place
        pin = place.device.type == "cuda"
        self.train_set, self.left_out = train_set, sorted(train_set.left_out + val_set.left_out)
        share = distributed.rank_slice()
        self.batches = training_batches(
            train_set, args.batch_size, args.seed, args.workers, pin, share
        )
        self.val_batches = validation_batches(val_set, args.workers, pin, share)
        self.optimizer = optim.make_optimizer(args, kind, model, place)
        self.scaler = place.scaler()
        order = {"-b": args.batch_size, "--seed": args.seed, "images": fingerprint(train_set)}
        self.progress = Progress(args.start_epoch, order=order)
        if content:
            self.progress, lost = checkpoint.load_progress(content, order)
            for line in filter(None, (lost, checkpoint.load_optimizer(self.optimizer, content))):
                print(f"Resuming: {line}.")
            checkpoint.load_scaler(self.scaler, content)
        steps, total = len(self.batches), args.epochs * len(self.batches)
        done = self.progress.epoch * steps + self.progress.position
        self.scheduler = optim.make_scheduler(args, self.optimizer, steps, done)
        self.average = optim.make_ema(args, model, total, done)
        self.network = self.average.module if self.average else model
        if content.get("trained") is not None:
            checkpoint.load_weights(model, content, args.resume, "trained")
        self.adversary = optim.make_adv_training(args, total)
        self.objective = optim.make_objective(args, self.adversary, val_set.num_classes)
        if self.adversary:
            self.held_out = fixed_subset_batch(val_set, HELD_OUT)
            self.watchdog = CatastrophicOverfittingGuard(chance=100 / val_set.num_classes)
            checkpoint.load_watchdog(self.watchdog, model, content)
        self.resumed_from = args.resume if content else None
        self.replica = distributed.wrap_ddp(model)

    def train(self) -> int:
        """Train to args.epochs; return the exit code, 128 + the signal if one stopped the run."""
        args, progress = self.args, self.progress
        if progress.epoch >= args.epochs:
            print(f"This run has done {progress.epoch} epochs: raise --epochs to go on.")
            return 0
        own = run_logger.run_dir_of(self.resumed_from) if self.resumed_from else None
        self.folder = own or run_logger.new_run(self.kind)
        self.models = self.folder / "models"
        print(f"Logs and checkpoints: {relpath(self.folder)}")
        with (
            run_logger.open_logger(
                self.folder, self.scheduler.last_epoch, progress.epoch
            ) as self.book,
            SavePoint(args.save_every) as self.point,
        ):
            self.book.config(
                {
                    "kind": self.kind,
                    "device": engine.device_name(self.place.device),
                    "arguments": vars(args),
                    "left_out": self.left_out,
                    "launch": distributed.launch_id(),
                }
            )
            while progress.epoch < args.epochs:
                seconds = self._train_epoch()
                if self.point.stopped_by or not self._finish_epoch(seconds):
                    return self._report_stop()
        return 0

    def _train_epoch(self) -> float:
        """Train to the end of the epoch, or to the step after which a stop was asked for.

        Returns the mean seconds of a step; `progress` holds the rest.
        """
        progress, first = self.progress, self.progress.position
        self.began = time.perf_counter() - progress.seconds
        tally, clock = EpochMetrics(self.place.device), StepTimer()
        if progress.tally:
            tally.load_state_dict(progress.tally)
        self.batches.batch_sampler.set_position(progress.epoch, first)
        steps = engine.train_epoch(
            self.replica,
            self.batches,
            nn.CrossEntropyLoss(label_smoothing=self.args.label_smoothing),
            self.optimizer,
            self.scheduler,
            self.place,
            tally,
            clock,
            seed=self.args.seed,
            clip_grad=self.args.clip_grad if self.kind == "vit" else 0.0,
            objective=self.objective,
            scaler=self.scaler,
        )
        with Console(len(self.batches), self.args.print_freq, first) as console:
            for i, rate in enumerate(steps, first):
                progress.position = i + 1
                if self.average:
                    self.average.update_parameters(self.model)
                if console.step(i):
                    last, mean = tally.compute()
                    self._check_loss(mean, tally)
                    console.train_line(
                        progress.epoch + 1, i, clock, last, mean, self.args.batch_size
                    )
                    self.book.log_step(self.scheduler.last_epoch - 1, last.loss, rate)
                if self.point.due():
                    self._keep(tally)
                    self._save_last()
                    if self.point.stopped_by:
                        break
        self._keep(tally)
        return clock.step.avg

    def _keep(self, tally: EpochMetrics) -> None:
        """Take the sums so far into `progress`, if they and the weights are finite."""
        self._check_loss(tally.compute()[1], tally)
        if bad := checkpoint.first_nonfinite(self._content()):
            raise self._diverged(f"{bad} is no longer finite", self.progress.position - 1)
        self.progress.tally = tally.state_dict()
        self.progress.seconds = time.perf_counter() - self.began

    def _finish_epoch(self, seconds: float) -> bool:
        """Validate, record, save. In this order a kill in between only repeats the rest.

        Returns False if a stop was asked for before validation had ended.
        """
        progress = self.progress
        val = self._validate()
        if val is None:
            self._save_last()
            return False
        print(run_logger.final_line(val))
        train = Metrics.of(*progress.tally[:4])
        robust = self._measure_robustness() if self.adversary else {}
        progress.epoch, progress.position, progress.tally = progress.epoch + 1, 0, []
        progress.seconds = 0.0
        self.book.log_epoch(
            progress.epoch,
            train,
            val,
            learning_rate=self.scheduler.get_last_lr()[0],
            images_per_second=self.args.batch_size / seconds if seconds else None,
            seconds=time.perf_counter() - self.began,
            peak_memory_bytes=self.place.peak_memory(),
            **robust,
        )
        if self._is_best(val.acc1, **robust):
            without = {"trained", "optimizer", "scheduler", "scaler", "progress", "watchdog"}
            best = {k: v for k, v in self._content().items() if k not in without}
            checkpoint.save(self.models / checkpoint.BEST, best)
        self._save_last()
        return True

    def _is_best(
        self,
        clean: float,
        robust_top1_accuracy: float = -1.0,
        collapsed: bool = False,
        **_: object,
    ) -> bool:
        """Whether the run was never better, in what --best-by names; keeps both records."""
        progress = self.progress
        if collapsed:  # the figures are of a network that is gone
            return False
        better = {
            "clean": clean > progress.best_acc1,
            "robust": robust_top1_accuracy > progress.best_robust,
        }
        progress.best_acc1 = max(progress.best_acc1, clean)
        progress.best_robust = max(progress.best_robust, robust_top1_accuracy)
        return better[self.args.best_by]

    def _measure_robustness(self) -> dict[str, float]:
        """Accuracy under PGD-10 on the held-out batch; on its collapse, the last good weights."""
        x, y = (
            self.place.to_device_images(self.held_out[0]),
            self.place.to_device_labels(self.held_out[1]),
        )
        adversary, epoch = self.adversary, self.progress.epoch + 1
        attack = PGD(epsilon=adversary.epsilon, pixels=adversary.pixels, early_stop=True)
        robust = robust_accuracy(self.network, attack, x, y)
        robust = (
            distributed.all_reduce_sum(torch.tensor(robust)).item() / distributed.world_size()
        )  # one mind
        print(
            f"Robust accuracy {robust:.1f} (untargeted PGD-{attack.steps}, l_inf, "
            f"eps {attack.epsilon:g}/255, {len(y)} validation images)"
        )
        epsilon = adversary.epsilon_at(epoch * len(self.batches) - 1)
        collapsed = epsilon > 0 and self.watchdog.collapsed(self.network, robust, epoch)
        if collapsed:
            self.model.load_state_dict(self.network.state_dict())
            optim.reset_optimizer_state(self.optimizer)  # it remembers the way into the collapse
            print(
                f"Catastrophic overfitting: robust accuracy fell from {self.watchdog.best:.1f}; "
                f"the weights of epoch {self.watchdog.epoch} are restored. If it comes again, "
                "use --at=pgd, a smaller --at-eps or a smaller --lr."
            )
        return {
            "robust_top1_accuracy": robust,
            "epsilon_255": epsilon,
            "collapsed": collapsed,
        }

    def _validate(self) -> Metrics | None:
        """Plain accuracy over the validation set; None if a stop is asked for meanwhile."""
        distributed.sync_buffers(self.network)
        tally, clock = EpochMetrics(self.place.device), StepTimer()
        passes = engine.evaluate(self.network, self.val_batches, self.place, tally, clock)
        with Console(len(self.val_batches), self.args.print_freq) as console:
            for i, _ in enumerate(passes):
                if console.step(i):
                    console.test_line(i, clock, *tally.compute())
                if self.point.stopped():
                    return None
        return tally.compute()[1]

    def _content(self) -> dict:
        progress = self.progress
        return {
            "epoch": progress.epoch,
            "model_arch": ARCHITECTURES.get(self.kind, self.kind),
            "kind": self.kind,
            "state_dict": self.network.state_dict(),
            "trained": self.model.state_dict() if self.average else None,
            "best_acc1": progress.best_acc1,
            "best_robust": progress.best_robust,
            "left_out": self.left_out,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {k: getattr(progress, k) for k in IN_EPOCH},
            "watchdog": self.watchdog.state() if self.adversary else None,
        }

    def _save_last(self) -> None:
        self.book.sync()
        previous = self.models / checkpoint.PREVIOUS
        checkpoint.save(self.models / checkpoint.LAST, self._content(), previous)
        self.point.saved()

    def _check_loss(self, mean: Metrics, tally: EpochMetrics) -> None:
        if not math.isfinite(mean.loss):
            raise self._diverged(f"the loss became {mean.loss}", tally.finite_batches())

    def _diverged(self, what: str, batch: int) -> UserError:
        """The error that names the batch of this epoch, counted from 0, after which `what` held."""
        epoch, steps = self.progress.epoch, len(self.batches)
        names = [self.train_set.paths[i] for i in self.batches.batch_sampler.indices(epoch, batch)]
        listed = self.folder / "bad_batch.txt"
        checkpoint.write_atomically(listed, "\n".join([*names, ""]).encode())
        rate = self.scheduler.rates(epoch * steps + batch)[0]
        good = checkpoint.latest_valid(self.models)
        return UserError(
            f"{what} in epoch {epoch + 1}, step {batch + 1} of {steps} (learning rate {rate:.3g}), "
            f"on {names[0]} and {len(names) - 1} more, listed in {relpath(listed)}; "
            + (f"the last good checkpoint is {relpath(good)}" if good else "none was saved")
            + ": try a lower --lr"
        )

    def _report_stop(self) -> int:
        last = relpath(self.models / checkpoint.LAST)
        words = [w for w in sys.argv if not w.startswith(("--resume=", "--start-epoch="))]
        for flag in {"--resume", "--start-epoch"} & set(words):
            at = words.index(flag)
            del words[at : at + 2]
        print(f"Stopped and saved. Go on with:\n  python {shlex.join(words)} --resume={last}")
        return 128 + self.point.stopped_by


def fingerprint(dataset: Dataset) -> int:
    """A number that other images, labels or another order of them would change."""
    return zlib.crc32(repr((dataset.paths, dataset.labels)).encode())
