"""Training loop: epochs, validation, checkpoints, shutdown."""

from __future__ import annotations

import math
import time
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from custom_dataloader import MiniPlacesLoader
from custom_transforms import IMAGENET_MEAN, IMAGENET_STD
from deepvision import checkpoint
from deepvision.attacks import PGD, InputScale, accuracy_under_attack
from deepvision.config import RunConfig
from deepvision.data.loader import (
    SeededLoader,
    fixed_subset_batch,
    training_batches,
    validation_batches,
)
from deepvision.models.registry import NETWORK_NAMES
from deepvision.models.scene_net import SceneNet
from deepvision.runtime import distributed, run_dir
from deepvision.runtime.atomic import write_atomically
from deepvision.runtime.console import Console, final_line
from deepvision.runtime.device import DeviceContext, changing_shapes, has_unused_parameters
from deepvision.runtime.jsonl import read_json
from deepvision.runtime.meters import EpochMetrics, Metrics, StepTimer
from deepvision.runtime.provenance import provenance
from deepvision.runtime.run_logger import HYPERPARAMETERS, make_logger
from deepvision.training import optim
from deepvision.training.engine import evaluate, train_epoch
from deepvision.training.objectives import (
    STEPS,
    AdversarialTraining,
    CutMix,
    Objective,
    Standard,
)
from deepvision.training.overfitting_guard import CatastrophicOverfittingGuard
from deepvision.training.progress import Progress
from deepvision.training.signals import CheckpointTimer, StopSignal
from utils import UserError, relpath

ARCHITECTURES = {"torch_conv": "simplenet", "custom_conv": "simplenet"}  # model_arch on disk
FIXED_SUBSET = 200  # validation images that the robust accuracy of each epoch is measured on
TRAINING_STATE = {"trained", "optimizer", "scheduler", "scaler", "progress", "watchdog"}


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run continues from, and the settings that the command line changes."""

    ckpt: dict
    path: str
    changed: dict[str, tuple]


@dataclass(frozen=True)
class Epoch:
    """The meters of an epoch in progress. start: time.perf_counter() when it began."""

    metrics: EpochMetrics
    timer: StepTimer
    console: Console
    start: float


@dataclass(frozen=True)
class Robustness:
    """Accuracy in per cent under attack, the radius of the last step, and whether it collapsed."""

    accuracy: float
    epsilon: float  # 8-bit intensity levels
    collapsed: bool


class Trainer:
    """One run, new or resumed.

    model: the network under training
    network: the network that is validated and saved as the best: `model`, or its EMA
    """

    def __init__(
        self,
        config: RunConfig,
        kind: str,
        model: nn.Module,
        datasets: tuple[MiniPlacesLoader, MiniPlacesLoader],
        context: DeviceContext,
        logs: Path,
        resumed: Resumed | None = None,
    ) -> None:
        self.config, self.kind, self.model, self.context = config, kind, model, context
        self.resumed, ckpt = resumed, resumed.ckpt if resumed else {}
        self.train_set, self.val_set = datasets
        self.batches, self.val_batches = make_loaders(config, datasets, context.device)
        fused = context.device.type == "cuda"
        self.optimizer = optim.make_optimizer(
            model, kind, config.lr, config.wd, config.momentum, fused
        )
        self.scaler = context.grad_scaler()
        self.progress = Progress(config.start_epoch, data_order=self._data_order())
        if resumed:
            self._load_progress(ckpt)
        steps, done = len(self.batches), self.steps_done()
        self.scheduler = optim.make_scheduler(
            self.optimizer, config.lr, config.warmup, config.epochs, steps, done
        )
        self.ema = optim.make_ema(model, config.ema, config.epochs * steps, done)
        self.network = self.ema.module if self.ema else model
        if ckpt.get("trained") is not None:
            checkpoint.load_weights(model, ckpt, resumed.path, "trained")
        self.objective = make_objective(config, self.val_set.num_classes, config.epochs * steps)
        self.guard = CatastrophicOverfittingGuard(chance=100 / self.val_set.num_classes)
        self.fixed_subset = fixed_subset_batch(self.val_set, FIXED_SUBSET) if config.at else None
        if ckpt.get("watchdog") is not None:
            with checkpoint.validated("watchdog"):
                self.guard.load_state_dict(ckpt["watchdog"], model)
        unused = distributed.world_size() > 1 and has_unused_parameters(model, context)
        self.replica = distributed.wrap_ddp(model, unused)
        self.stop, self.checkpoint_timer = StopSignal(), CheckpointTimer(config.save_every)
        self.run_dir = self._run_dir(logs)
        self.models = self.run_dir / "models"
        if self.progress.iterations is None:
            self.progress.iterations = done
        self.logger = make_logger(self.run_dir, self.progress.iterations, self.progress.epoch)

    def _data_order(self) -> dict:
        """What the order of the batches follows from, by name."""
        config = self.config
        images = fingerprint(self.train_set)
        return {"-b": config.batch_size, "--seed": config.seed, "images": images}

    def steps_done(self) -> int:
        """Training steps of the run so far."""
        return self.progress.epoch * len(self.batches) + self.progress.batch_in_epoch

    def _load_progress(self, ckpt: dict) -> None:
        with checkpoint.validated("epoch, best_acc1 or progress"):
            lost = self.progress.load_state_dict(ckpt)
        for line in filter(None, (lost, checkpoint.load_optimizer(self.optimizer, ckpt))):
            print(f"Resuming: {line}.")
        checkpoint.load_scaler(self.scaler, ckpt)

    def _run_dir(self, logs: Path) -> Path:
        """The run folder that the checkpoint came from, else a new one."""
        if self.progress.epoch >= self.config.epochs:  # nothing will be written
            return logs
        own = run_dir.run_dir_of(self.resumed.path, logs) if self.resumed else None
        return own or run_dir.new_run_dir(logs, self.kind)

    def train(self) -> int:
        """Train to config.epochs; return the exit code, 128 + the signal if one stopped the run."""
        config, progress = self.config, self.progress
        if progress.epoch >= config.epochs:
            print(f"This run has done {progress.epoch} epochs: raise --epochs to train further.")
            return 0
        print(f"Logs and checkpoints: {relpath(self.run_dir)}")
        print(f"Curves: tensorboard --logdir={relpath(self.run_dir)}")
        with self.logger, self.stop:
            self._log_config()
            while progress.epoch < config.epochs:
                epoch = self._begin_epoch()
                with epoch.console:
                    train_epoch(
                        self.replica,
                        self.batches,
                        self.objective,
                        self.optimizer,
                        self.scheduler,
                        self.context,
                        epoch.metrics,
                        epoch.timer,
                        seed=config.seed,
                        clip_grad=config.clip_grad if self.kind == "vit" else 0.0,
                        scaler=self.scaler,
                        ema=self.ema,
                        after_step=partial(self._after_step, epoch),
                    )
                self._update_progress(epoch)
                if self.stop.stopped_by or not self._finish_epoch(epoch):
                    return self._report_stop()
        return 0

    def _begin_epoch(self) -> Epoch:
        """Set the loader to the next batch; meters that continue an interrupted epoch."""
        progress, metrics = self.progress, EpochMetrics(self.context.device)
        if progress.metric_sums:
            metrics.load_state_dict(progress.metric_sums)
        self.batches.batch_sampler.set_position(progress.epoch, progress.batch_in_epoch)
        console = Console(len(self.batches), self.config.print_freq, progress.batch_in_epoch)
        return Epoch(metrics, StepTimer(), console, time.perf_counter() - progress.seconds)

    def _after_step(self, epoch: Epoch, lr: float) -> bool:
        """Print, log and save what is due; return False if the run is to stop."""
        progress, i = self.progress, self.progress.batch_in_epoch
        progress.batch_in_epoch += 1
        progress.iterations += 1
        if epoch.console.advance(i):
            last, mean = epoch.metrics.compute()
            self._check_loss(mean, epoch.metrics)
            size = self.config.batch_size
            epoch.console.train_line(progress.epoch + 1, i, epoch.timer, last, mean, size)
            self.logger.log_step(progress.iterations - 1, last.loss, lr)
        if self.stop.check(save_due=self.checkpoint_timer.step()):
            self._update_progress(epoch)
            self._save_last()
        return self.stop.stopped_by is None

    def _update_progress(self, epoch: Epoch) -> None:
        """Take the sums so far into `progress`, if they and the weights are finite."""
        self._check_loss(epoch.metrics.compute()[1], epoch.metrics)
        if bad := checkpoint.first_nonfinite(self._ckpt()):
            raise self._diverged(f"{bad} is no longer finite", self.progress.batch_in_epoch - 1)
        self.progress.metric_sums = epoch.metrics.state_dict()
        self.progress.seconds = time.perf_counter() - epoch.start

    def _finish_epoch(self, epoch: Epoch) -> bool:
        """Validate, log, save. In this order a kill in between only repeats the rest.

        Returns False if a stop was requested before the validation had ended.
        """
        progress, val = self.progress, self._validate()
        if val is None:
            self._save_last()
            return False
        print(final_line(val))
        train = Metrics.from_sums(*progress.metric_sums[:4])
        robust = self._measure_robustness() if self.config.at else None
        progress.finish_epoch()
        seconds = epoch.timer.step.avg
        columns = {
            "learning_rate": self.scheduler.get_last_lr()[0],
            "images_per_second": self.config.batch_size / seconds if seconds else None,
            "seconds": time.perf_counter() - epoch.start,
            "peak_memory_bytes": self.context.peak_memory(),
        }
        if robust:
            columns["robust_top1_accuracy"] = robust.accuracy
            columns |= {"epsilon_255": robust.epsilon, "collapsed": robust.collapsed}
        self.logger.log_epoch(progress.epoch, train, val, columns)
        if self._is_best(val, robust):
            best = {k: v for k, v in self._ckpt().items() if k not in TRAINING_STATE}
            checkpoint.save(self.models / checkpoint.BEST, best)
        self._save_last()
        return True

    def _validate(self) -> Metrics | None:
        """Accuracy on the validation set; None if a stop is requested meanwhile."""
        distributed.sync_buffers(self.network)
        metrics, timer = EpochMetrics(self.context.device), StepTimer()
        with Console(len(self.val_batches), self.config.print_freq) as console:

            def after_batch(*_: torch.Tensor) -> bool:
                i = timer.step.count - 1
                if console.advance(i):
                    console.test_line(i, timer, metrics)
                return not self.stop.check()

            complete = evaluate(
                self.network,
                self.val_batches,
                self.context,
                metrics,
                timer,
                after_batch=after_batch,
            )
        return metrics.compute()[1] if complete else None

    # ---- adversarial training

    def _measure_robustness(self) -> Robustness:
        """Robust accuracy after the epoch; after a collapse the last good weights are restored."""
        epoch = self.progress.epoch + 1
        epsilon = self.objective.epsilon_at(epoch * len(self.batches) - 1)
        accuracy = self._robust_accuracy()
        collapsed = epsilon > 0 and self.guard.check_and_restore(self.network, accuracy, epoch)
        if collapsed:
            self.model.load_state_dict(self.network.state_dict())
            optim.reset_optimizer_state(self.optimizer)  # its momentum leads into the collapse
            print(
                f"Catastrophic overfitting: robust accuracy fell from {self.guard.best:.1f}; "
                f"the weights of epoch {self.guard.epoch} are restored. If it happens again, "
                "use --at=pgd, a smaller --at-eps or a smaller --lr."
            )
        return Robustness(accuracy, epsilon, collapsed)

    def _robust_accuracy(self) -> float:
        """Accuracy in per cent under untargeted PGD-10 on the fixed subset, averaged over ranks."""
        x, y = self.context.to_device(*self.fixed_subset)
        epsilon = self.objective.epsilon
        attack = PGD(epsilon=epsilon, pixels=self.objective.scale, early_stop=True)
        with changing_shapes():  # a sample leaves the batch when the attack succeeds
            accuracy = torch.tensor(accuracy_under_attack(self.network, attack, x, y))
        accuracy = distributed.all_reduce_sum(accuracy).item() / distributed.world_size()
        print(
            f"Robust accuracy {accuracy:.1f} (untargeted PGD-{attack.steps}, l_inf, "
            f"eps {epsilon:g}/255, {len(y)} validation images)"
        )
        return accuracy

    # ---- records

    def _is_best(self, val: Metrics, robust: Robustness | None) -> bool:
        """Return True if this epoch is the best so far by --best-by; update both records."""
        progress = self.progress
        if robust and robust.collapsed:  # the figures of weights that were replaced
            return False
        accuracy = robust.accuracy if robust else -1.0
        better = {"clean": val.acc1 > progress.best_acc1, "robust": accuracy > progress.best_robust}
        progress.best_acc1 = max(progress.best_acc1, val.acc1)
        progress.best_robust = max(progress.best_robust, accuracy)
        return better[self.config.best_by]

    def _skipped(self) -> list[str]:
        return sorted(self.train_set.skipped + self.val_set.skipped)

    def _shape(self) -> dict | None:
        """The shape of a SceneNet, for files; None for other networks."""
        return self.model.shape.save() if isinstance(self.model, SceneNet) else None

    def _ckpt(self) -> dict:
        return {
            **self.progress.state_dict(),
            "model_arch": ARCHITECTURES.get(self.kind, self.kind),
            "kind": self.kind,
            "shape": self._shape(),
            "config": self.config.as_dict(),
            "float32_matmul": torch.get_float32_matmul_precision(),
            "state_dict": self.network.state_dict(),
            "trained": self.model.state_dict() if self.ema else None,
            "left_out": self._skipped(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "watchdog": self.guard.state_dict() if self.config.at else None,
        }

    def _save_last(self) -> None:
        self.logger.sync()
        previous = self.models / checkpoint.PREVIOUS
        checkpoint.save(self.models / checkpoint.LAST, self._ckpt(), previous)
        self.checkpoint_timer.reset()

    def _log_config(self) -> None:
        """Write config.json: what the run is, and the history of its starts and resumes."""
        config, origin = self.config, provenance(self.context.device, self.config.command)
        history = read_json(self.run_dir / "config.json").get("history", [])
        entry = {"date": origin["date"], "command": origin["command"], "epoch": self.progress.epoch}
        if self.resumed:
            entry["changed"] = {k: list(v) for k, v in self.resumed.changed.items()}
        else:
            entry["arguments"] = config.as_dict()
        record = {
            "kind": self.kind,
            "network": NETWORK_NAMES[self.kind],
            "shape": self._shape(),
            "data": {
                "folder": Path(config.data_folder).resolve().name,
                "classes": self.val_set.num_classes,
                "train": len(self.train_set),
                "val": len(self.val_set),
                "fingerprint": f"{fingerprint(self.train_set):08x}",
            },
            **origin,
            "arguments": config.as_dict(),
            "float32_matmul": torch.get_float32_matmul_precision(),
            "left_out": self._skipped(),
            "launch": distributed.launch_id(),
            "history": [*history, entry],
        }
        values = {name: getattr(config, name) for name in HYPERPARAMETERS}
        network = NETWORK_NAMES[self.kind] + (f" + {config.at}" if config.at else "")
        hparams = {"network": network, **values}
        self.logger.log_config(record, hparams)

    # ---- shutdown

    def _check_loss(self, mean: Metrics, metrics: EpochMetrics) -> None:
        if not math.isfinite(mean.loss):
            raise self._diverged(f"the loss became {mean.loss}", metrics.finite_batches())

    def _diverged(self, what: str, batch: int) -> UserError:
        """The error that names the batch of this epoch, counted from 0, after which `what` held."""
        epoch, steps = self.progress.epoch, len(self.batches)
        names = [self.train_set.paths[i] for i in self.batches.batch_sampler.indices(epoch, batch)]
        listed = self.run_dir / "bad_batch.txt"
        write_atomically(listed, "\n".join([*names, ""]).encode())
        lr = self.scheduler.rates(epoch * steps + batch)[0]
        valid = checkpoint.latest_valid(self.models)
        return UserError(
            f"{what} in epoch {epoch + 1}, step {batch + 1} of {steps} (learning rate {lr:.3g}), "
            f"on {names[0]} and {len(names) - 1} more, listed in {relpath(listed)}; "
            + (f"the last valid checkpoint is {relpath(valid)}" if valid else "none was saved")
            + ": try a lower --lr"
        )

    def _report_stop(self) -> int:
        command = self.config.resume_command(relpath(self.models / checkpoint.LAST))
        print(f"Stopped and saved. Resume with:\n  {command}")
        return 128 + self.stop.stopped_by


def make_loaders(
    config: RunConfig, datasets: tuple[MiniPlacesLoader, MiniPlacesLoader], device: torch.device
) -> tuple[SeededLoader, SeededLoader]:
    """The loaders of training and validation batches; each rank gets its slice."""
    train_set, val_set = datasets
    part, workers = distributed.rank_slice(), config.workers
    batches = training_batches(train_set, config.batch_size, config.seed, workers, device, part)
    return batches, validation_batches(val_set, workers, device, part)


def make_objective(config: RunConfig, num_classes: int, total_steps: int) -> Objective:
    """The objective that the settings ask for.

    --at from scratch: a quarter of the run is clean, and epsilon is full from three quarters on. A
    network that starts from --weights is attacked at once, at full epsilon after a quarter.
    """
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    if config.cutmix:
        return CutMix(criterion, num_classes, config.cutmix)
    if config.at is None:
        return Standard(criterion)
    quarter = total_steps // 4
    return AdversarialTraining(
        criterion=criterion,
        mode=config.at,
        epsilon=config.at_eps,
        steps=STEPS[config.at] if config.pgd_steps is None else config.pgd_steps,
        scale=InputScale("255", IMAGENET_MEAN, IMAGENET_STD),
        attack_prob=config.pgd_prob,
        clean_mix=config.pgd_blend,
        eps_warmup=(0, quarter) if config.weights else (quarter, 3 * quarter),
    )


def fingerprint(dataset: MiniPlacesLoader) -> int:
    """A number that changes with the list of images, their labels or their order."""
    return zlib.crc32(repr((dataset.paths, dataset.labels)).encode())
