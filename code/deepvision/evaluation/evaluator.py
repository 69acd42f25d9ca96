"""What -e and -a tell of a trained network: accuracies, pictures, and what they are worth."""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from dataclasses import asdict

import torch
from torch import Tensor, nn

import student_code
from custom_dataloader import MiniPlacesLoader
from custom_transforms import IMAGENET_MEAN, IMAGENET_STD
from deepvision.attacks import diagnostics
from deepvision.attacks.norms import InputScale
from deepvision.attacks.pgd import PGD
from deepvision.checkpoint import write_atomically
from deepvision.data.loader import fixed_subset_batch, validation_batches
from deepvision.evaluation import pictures
from deepvision.evaluation.saliency import grad_cam, saliency
from deepvision.runtime import distributed, run_logger
from deepvision.runtime.run_logger import Console, RunLogger, final_line
from deepvision.training import engine
from deepvision.training.engine import DeviceContext, EpochMetrics, Metrics, StepTimer
from utils import relpath

DIFFERENCE_FACTOR = 10
SHOWN = 20  # images of a batch that get captions
PROBED = 100  # images that health lights and sweep are measured on


class Evaluator:
    """One pass over the validation set with -e or -a; its findings go beside the checkpoint."""

    def __init__(
        self, args: Namespace, model: nn.Module, val_set: MiniPlacesLoader, place: DeviceContext
    ) -> None:
        self.args, self.model, self.val_set, self.place = args, model, val_set, place
        pin = place.device.type == "cuda"
        self.batches = validation_batches(val_set, args.workers, pin, distributed.rank_slice())
        names = val_set.get_index_mapping()
        self.categories = [names.get(str(k), str(k)) for k in range(val_set.num_classes)]

    def run(self) -> int:
        with self._logbook() as self.book:
            (self._evaluate if self.args.evaluate else self._attack)()
        return 0

    def _logbook(self) -> contextlib.AbstractContextManager[RunLogger | None]:
        """That of the run that was trained, where there are pictures or curves to keep."""
        if not (self.args.vis or self.args.sweep):
            return contextlib.nullcontext()
        folder = run_logger.run_dir_of(self.args.resume) or run_logger.new_run("evaluation")
        print(f"Pictures: tensorboard --logdir={relpath(folder)}")
        return run_logger.open_logger(folder)

    # ---- -e

    def _evaluate(self) -> None:
        """Accuracy without and with mirror averaging."""
        plain, mirrored, clock = (
            EpochMetrics(self.place.device),
            EpochMetrics(self.place.device),
            StepTimer(),
        )
        with self._console() as console:
            passes = engine.evaluate(self.model, self.batches, self.place, plain, clock, mirrored)
            for i, (x, y) in enumerate(passes):
                if console.step(i):
                    console.test_line(i, clock, *mirrored.compute())
                    if self.book:
                        self._show_saliency(x, y, i)
        self._conclude(
            {},
            plain=("Each image by itself:", plain.compute()[1]),
            mirrored=("Averaged with its mirror image:", mirrored.compute()[1]),
        )

    def _show_saliency(self, x: Tensor, y: Tensor, step: int) -> None:
        self.book.add_image("Image/Image", student_code.default_visfunction(x), step)
        x, y = x[:SHOWN].clone(), y[:SHOWN].tolist()  # a clone, as gradients need an ordinary one
        maps, logits = saliency(self.model, x)
        found = pictures.format_predictions(logits, self.categories)
        captions = [[f"true: {self.categories[k]}", text] for k, text in zip(y, found, strict=True)]
        shown = {"Image/Saliency": maps, "Image/GradCAM": grad_cam(self.model, x)}
        for tag, maps in shown.items():
            if maps is not None:
                images = pictures.overlay(pictures.pixels(x), maps)
                tiles = [pictures.tile(*pair) for pair in zip(images, captions, strict=True)]
                self.book.add_image(tag, pictures.grid(tiles, 5), step)

    # ---- -a

    def _attack(self) -> None:
        """Accuracy before and after an attack, on the same images."""
        attack = attack_from_config(self.args)
        student = student_code.default_attack(nn.CrossEntropyLoss())

        def perturb(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return attack.perturb(model, x, y) if attack else student.perturb(model, x)

        clean, adversarial, clock = (
            EpochMetrics(self.place.device),
            EpochMetrics(self.place.device),
            StepTimer(),
        )
        with self._console() as console:
            passes = engine.attack(
                self.model, self.batches, perturb, self.place, clean, adversarial, clock
            )
            for i, (x, x_adv, y) in enumerate(passes):
                if console.step(i):
                    console.test_line(i, clock, *adversarial.compute())
                    if self.args.vis:
                        self._show_attack(x, x_adv, y, i)
        words = diagnostics.describe(attack) if attack else budget_of(student)
        self._conclude(
            self._probe(attack) if attack else {},
            clean=("Clean images:", clean.compute()[1]),
            attacked=(f"Attacked images{words and ', '}{words}:", adversarial.compute()[1]),
        )

    def _show_attack(self, x: Tensor, x_adv: Tensor, y: Tensor, step: int) -> None:
        """Pictures before and after, their difference, and strips of the three with captions."""
        k = DIFFERENCE_FACTOR
        changed = pictures.difference(x, x_adv, k)
        for tag, batch in (("Org_Image", x), ("Adv_Image", x_adv), (f"Difference_x{k}", changed)):
            self.book.add_image(f"Image/{tag}", student_code.default_visfunction(batch), step)
        columns = []
        for batch in (x[:SHOWN], x_adv[:SHOWN]):
            with torch.no_grad():
                found = pictures.format_predictions(self.model(batch), self.categories)
            columns.append((pictures.pixels(batch), found))
        truth = [f"true: {self.categories[label]}" for label in y[:SHOWN].tolist()]
        columns.append((pictures.pixels(changed[:SHOWN]), [f"difference x {k}"] * len(truth)))
        tiles = [
            pictures.tile(images[i], [truth[i], found[i]])
            for i in range(len(truth))
            for images, found in columns
        ]
        self.book.add_image("Image/Strips", pictures.grid(tiles, 6), step)

    def _probe(self, attack: PGD) -> dict:
        """Health lights, and with --sweep accuracy over ε and steps, on a few images."""
        x, y = fixed_subset_batch(self.val_set, PROBED)
        x, y = self.place.to_device_images(x), self.place.to_device_labels(y)
        print(f"Health lights ({len(y)} images; accuracies in per cent):")
        lights = []
        for light in diagnostics.run_diagnostics(self.model, x, y, attack):
            print(light.line(), flush=True)
            lights.append(asdict(light))
        found = {"attack": diagnostics.describe(attack), "probed": len(y), "lights": lights}
        return found | ({"sweep": self._sweep(x, y, attack)} if self.args.sweep else {})

    def _sweep(self, x: Tensor, y: Tensor, attack: PGD) -> list[dict]:
        points = []
        for epsilon, steps, accuracy in diagnostics.sweep(self.model, x, y, attack):
            points.append((epsilon, steps, accuracy))
            for curve in [steps] if steps else diagnostics.STEPS:  # all begin at the clean accuracy
                self.book.add_curve_point(
                    "robustness/top1_accuracy", f"{curve}_steps", accuracy, epsilon
                )
        text = diagnostics.table(attack.norm, points, len(y))
        print(text)
        self.book.text("robustness/sweep", text)
        write_atomically(self.book.folder / "sweep.md", f"{text}\n".encode())
        return [dict(zip(("epsilon_255", "steps", "top1"), p, strict=True)) for p in points]

    # ---- both

    def _console(self) -> Console:
        return Console(len(self.batches), self.args.print_freq)

    def _conclude(self, more: dict, **findings: tuple[str, Metrics]) -> None:
        """Print each finding, the one that counts last, and keep them all beside the run."""
        row = {"checkpoint": os.path.basename(self.args.resume)}
        for name, (title, scores) in findings.items():
            print(title, final_line(scores), sep="\n")
            row |= {f"{name}_top1": scores.acc1, f"{name}_top5": scores.acc5}
        if folder := run_logger.run_dir_of(self.args.resume):
            run_logger.add_evaluation(folder, **row, **more)


def attack_from_config(args: Namespace) -> PGD | None:
    """The attack that the --attack- flags describe, None where there is none of them."""
    options = {
        "steps": args.attack_steps,
        "step_size": args.attack_step_size,
        "goal": args.attack_goal,
        "restarts": args.attack_restarts,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if not (given or args.attack_norm or args.attack_eps is not None or args.sweep):
        return None
    norm = args.attack_norm or "linf"
    epsilon = diagnostics.EPSILONS[norm] if args.attack_eps is None else args.attack_eps
    pixels = InputScale("255", IMAGENET_MEAN, IMAGENET_STD)
    return PGD(norm=norm, epsilon=epsilon, pixels=pixels, **given)


def budget_of(attacker: object) -> str:
    """The ε of a `default_attack` in both units, if it tells its own."""
    epsilon = getattr(attacker, "epsilon", None)
    if epsilon is None:
        return ""
    levels = ", ".join(f"{255 * epsilon * s:.2f}" for s in IMAGENET_STD)
    return f"ε = {epsilon:g} normalised = ({levels})/255 in R, G, B"
