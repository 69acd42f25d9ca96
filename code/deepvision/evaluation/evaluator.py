"""Evaluation of a trained network: -e and -a, with accuracies, images, diagnostics."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from custom_dataloader import MiniPlacesLoader
from custom_transforms import IMAGENET_MEAN, IMAGENET_STD
from deepvision.attacks import EPSILONS, PGD, AutoAttack, InputScale, run_diagnostics
from deepvision.config import RunConfig
from deepvision.data.loader import fixed_subset_batch, validation_batches
from deepvision.evaluation import pictures, sweep
from deepvision.evaluation.robust_eval import (
    attack_errors,
    evaluate_robustness,
    run_dir_of_network,
)
from deepvision.evaluation.saliency import grad_cam, saliency
from deepvision.evaluation.views import evaluate_views
from deepvision.models import student
from deepvision.runtime import distributed
from deepvision.runtime.atomic import write_atomically
from deepvision.runtime.console import Console, final_line
from deepvision.runtime.device import DeviceContext, device_name
from deepvision.runtime.meters import EpochMetrics, Metrics, StepTimer
from deepvision.runtime.run_dir import append_evaluation, new_run_dir, run_dir_of
from deepvision.runtime.run_logger import make_logger
from deepvision.training.engine import evaluate, evaluate_under_attack
from utils import relpath

DIFFERENCE_FACTOR = 10
CAPTIONED = 6  # images of a batch that get captions, large enough to be read
SUITE_IMAGES = 1000  # images that AutoAttack is run on, as on RobustBench
PROBED = 100  # images that diagnostics and sweep are measured on


class Evaluator:
    """One pass over the validation set with -e or -a; its records go to the checkpoint's run."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        val_set: MiniPlacesLoader,
        context: DeviceContext,
        logs: Path,
    ) -> None:
        self.config, self.model, self.val_set, self.context = config, model, val_set, context
        share = distributed.rank_slice()
        self.batches = validation_batches(val_set, config.workers, context.device, share)
        names = val_set.get_index_mapping()
        self.class_names = [names.get(str(k), str(k)) for k in range(val_set.num_classes)]
        run_dir = run_dir_of(config.resume, logs)
        if config.attack_suite:  # of a checkpoint outside `logs`, a stopped one continues
            run_dir = run_dir or run_dir_of_network(model, logs)
        self.logger = make_logger(run_dir or new_run_dir(logs, "evaluation"))
        self.logs_events = config.vis or config.sweep
        self.timer, self.console = StepTimer(), Console(len(self.batches), config.print_freq)

    def run(self) -> int:
        """Evaluate or attack; return the exit code 0."""
        if self.logs_events:
            print(f"Pictures: tensorboard --logdir={relpath(self.logger.run_dir)}")
        with self.logger if self.logs_events else contextlib.nullcontext(), attack_errors():
            if self.config.evaluate:
                self._evaluate()
            elif self.config.attack_suite:
                self._run_suite()
            else:
                self._attack()
        return 0

    def _line_due(self, metrics: EpochMetrics) -> int | None:
        """The batch that has just ended, if its line is due; it is then printed."""
        i = self.timer.step.count - 1
        if not self.console.advance(i):
            return None
        self.console.test_line(i, self.timer, metrics)
        return i

    # ---- -e

    def _evaluate(self) -> None:
        """Accuracy without and with mirror averaging."""
        plain, flip_tta = (EpochMetrics(self.context.device) for _ in range(2))

        def after_batch(x: Tensor, y: Tensor) -> bool:
            if (i := self._line_due(flip_tta)) is not None and self.config.vis:
                self._show_saliency(x, y, i)
            return True

        with self.console:
            evaluate(
                self.model, self.batches, self.context, plain, self.timer, flip_tta, after_batch
            )
        self._conclude(
            self._views() if self.config.views else {},
            plain=("Single images:", plain.compute()[1]),
            mirrored=("Averaged with the mirror images:", flip_tta.compute()[1]),
        )

    def _views(self) -> dict:
        """Accuracy on larger views of the images, and of their mean."""
        print("Averaged with the mirror images, by view:")
        rows, workers = {}, self.config.workers
        for name, metrics in evaluate_views(self.model, self.val_set, self.context, workers):
            print(f"  {name:<20} Acc@1 {metrics.acc1:.3f} Acc@5 {metrics.acc5:.3f}", flush=True)
            rows[name] = [metrics.acc1, metrics.acc5]
        return {"views": rows}

    def _show_saliency(self, x: Tensor, y: Tensor, step: int) -> None:
        self.logger.add_image("Image/Image", student.image_grid(x), step)
        if (attention := student.attention_grid(self.model, x.clone())) is not None:
            self.logger.add_image("Image/Image_Atten", attention, step)
        x, y = x[:CAPTIONED].clone(), y[:CAPTIONED].tolist()  # inference tensors have no gradient
        maps, logits = saliency(self.model, x)
        predictions = pictures.format_predictions(logits, self.class_names)
        captions = [
            [f"true: {self.class_names[k]}", text] for k, text in zip(y, predictions, strict=True)
        ]
        for tag, overlaid in (("Saliency", maps), ("GradCAM", grad_cam(self.model, x))):
            if overlaid is not None:
                images = pictures.overlay(pictures.pixels(x), overlaid)
                tiles = [pictures.tile(*pair) for pair in zip(images, captions, strict=True)]
                self.logger.add_image(f"Image/{tag}", pictures.grid(tiles, 3), step)

    # ---- -a

    def _attack(self) -> None:
        """Accuracy before and after an attack, on the same images."""
        attack = attack_from_config(self.config)
        default = student.default_attack(nn.CrossEntropyLoss())
        clean, adversarial = (EpochMetrics(self.context.device) for _ in range(2))

        def perturb(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return attack.perturb(model, x, y) if attack else default.perturb(model, x)

        def after_batch(x: Tensor, x_adv: Tensor, y: Tensor) -> None:
            if (i := self._line_due(adversarial)) is not None and self.config.vis:
                self._show_attack(x, x_adv, y, i)

        with self.console:
            evaluate_under_attack(
                self.model,
                self.batches,
                perturb,
                self.context,
                clean,
                adversarial,
                self.timer,
                after_batch,
            )
        description = sweep.describe(attack) if attack else epsilon_of(default)
        title = f"Attacked images, {description}:" if description else "Attacked images:"
        self._conclude(
            self._diagnose(attack) if attack else {},
            clean=("Clean images:", clean.compute()[1]),
            attacked=(title, adversarial.compute()[1]),
        )

    def _show_attack(self, x: Tensor, x_adv: Tensor, y: Tensor, step: int) -> None:
        """Images before and after, their difference, and strips of the three with captions."""
        k = DIFFERENCE_FACTOR
        changed = pictures.difference(x, x_adv, k)
        for tag, batch in (("Org_Image", x), ("Adv_Image", x_adv), (f"Difference_x{k}", changed)):
            self.logger.add_image(f"Image/{tag}", student.image_grid(batch), step)
        columns = []
        for batch in (x[:CAPTIONED], x_adv[:CAPTIONED]):
            with torch.no_grad():
                predictions = pictures.format_predictions(self.model(batch), self.class_names)
            columns.append((pictures.pixels(batch), predictions))
        truth = [f"true: {self.class_names[label]}" for label in y[:CAPTIONED].tolist()]
        columns.append((pictures.pixels(changed[:CAPTIONED]), [f"difference x {k}"] * len(truth)))
        tiles = [
            pictures.tile(images[i], [truth[i], captions[i]])
            for i in range(len(truth))
            for images, captions in columns
        ]
        self.logger.add_image("Image/Strips", pictures.grid(tiles, 3), step)

    def _run_suite(self) -> None:
        """Robust accuracy under AutoAttack's set; a stopped evaluation continues."""
        config, images = self.config, self.config.attack_images or SUITE_IMAGES
        x, y = self.context.to_device(*fixed_subset_batch(self.val_set, images))
        norm = config.attack_norm or "linf"
        epsilon = EPSILONS[norm] if config.attack_eps is None else config.attack_eps
        version, scale = config.attack_suite, InputScale("255", IMAGENET_MEAN, IMAGENET_STD)
        suite = AutoAttack(norm=norm, epsilon=epsilon, version=version, pixels=scale)
        name = f"autoattack_{version}_{norm}_{epsilon:g}_{len(y)}.json"
        path = self.logger.run_dir / name
        print(f"Results image by image, from which a stopped evaluation continues: {relpath(path)}")
        result = evaluate_robustness(self.model.eval(), x, y, suite, path)
        if config.vis:
            x, y = x[:CAPTIONED], y[:CAPTIONED]
            first = suite.stages(self.val_set.num_classes)[0].attack
            self._show_attack(x, first.perturb(self.model, x, y), y, 0)
        print(result.format_table(), result.summary(), sep="\n")
        print(f"******Acc@1 {result.progress.accuracy:.3f}")
        row = self._row() | {"suite": result.summary()}
        row |= {"suite_top1": result.progress.accuracy, "suite_images": len(y)}
        append_evaluation(self.logger.run_dir, row)

    def _diagnose(self, attack: PGD) -> dict:
        """Diagnostics, and with --sweep accuracy over eps and steps, on a few images."""
        x, y = self.context.to_device(*fixed_subset_batch(self.val_set, PROBED))
        print(f"Diagnostics of the attack ({len(y)} images; accuracies in per cent):")
        rows = []
        for diagnostic in run_diagnostics(self.model, x, y, attack):
            print(diagnostic.line(), flush=True)
            rows.append(diagnostic.record())
        found = {"attack": sweep.describe(attack), "probed": len(y), "lights": rows}
        return found | ({"sweep": self._sweep(x, y, attack)} if self.config.sweep else {})

    def _sweep(self, x: Tensor, y: Tensor, attack: PGD) -> list[dict]:
        points = []
        for epsilon, steps, accuracy in sweep.sweep(self.model, x, y, attack):
            points.append((epsilon, steps, accuracy))
            for curve in [steps] if steps else sweep.STEPS:  # all start at the clean accuracy
                self.logger.add_scalar(f"robustness/top1_{curve}_steps", accuracy, epsilon)
        text = sweep.format_table(attack.norm, points, len(y))
        print(text)
        self.logger.add_text("robustness/sweep", text)
        write_atomically(self.logger.run_dir / "sweep.md", f"{text}\n".encode())
        return [dict(zip(("epsilon_255", "steps", "top1"), p, strict=True)) for p in points]

    # ---- both

    def _row(self) -> dict:
        """What an evaluation was of, for its record."""
        config = self.config
        return {
            "checkpoint": os.path.basename(config.resume),
            "command": config.command,
            "data": Path(config.data_folder).resolve().name,
            "images": len(self.val_set),
            "device": device_name(self.context.device),
        }

    def _conclude(self, more: dict, **results: tuple[str, Metrics]) -> None:
        """Print each result, the one that counts last, and append them to the run's records."""
        row = self._row()
        for name, (title, metrics) in results.items():
            print(title, final_line(metrics), sep="\n")
            row |= {f"{name}_top1": metrics.acc1, f"{name}_top5": metrics.acc5}
        append_evaluation(self.logger.run_dir, row | more)


def attack_from_config(config: RunConfig) -> PGD | None:
    """The attack that the --attack- flags describe; None where there is none of them."""
    options = {
        "steps": config.attack_steps,
        "step_size": config.attack_step_size,
        "goal": config.attack_goal,
        "restarts": config.attack_restarts,
        "loss": config.attack_loss,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if not (given or config.attack_norm or config.attack_eps is not None or config.sweep):
        return None
    norm = config.attack_norm or "linf"
    epsilon = EPSILONS[norm] if config.attack_eps is None else config.attack_eps
    scale = InputScale("255", IMAGENET_MEAN, IMAGENET_STD)
    return PGD(norm=norm, epsilon=epsilon, pixels=scale, **given)


def epsilon_of(attack: object) -> str:
    """The epsilon of a `default_attack` in both units, if it has that attribute."""
    epsilon = getattr(attack, "epsilon", None)
    if epsilon is None:
        return ""
    levels = ", ".join(f"{255 * epsilon * s:.2f}" for s in IMAGENET_STD)
    return f"ε = {epsilon:g} normalised = ({levels})/255 in R, G, B"
