"""AutoAttack: APGD-CE, targeted APGD-DLR, FAB-T and Square, each on the images still right.

Croce & Hein, 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks"; l_1: Croce & Hein, 2021, "Mind the Box". Needs torch only.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deepvision.attacks.accuracy import correct_under_attack
from deepvision.attacks.apgd import APGD
from deepvision.attacks.fab import FAB
from deepvision.attacks.norms import InputScale
from deepvision.attacks.pgd import Attack, Model, frozen_eval_mode, is_randomised
from deepvision.attacks.square import Square

VERSIONS = ("standard", "rand")
CLEAN = "clean"  # an image that is wrong without an attack


@dataclass
class Progress:
    """What an evaluation has done so far; it can be saved, and the evaluation continued from it.

    fell_to: for each image the attack that changed its prediction, "clean" where it was wrong
        before, None where it is still right.
    attacks: the names of the set, in their order.
    done: finished units of work; each is one attack on one batch of images.
    forward_passes: of single images; seconds: both of all sessions together.
    passes_left: the forward passes still to do if no other image falls.
    """

    fell_to: list[str | None]
    attacks: list[str] = field(default_factory=list)
    done: int = 0
    units: int = 0
    forward_passes: int = 0
    seconds: float = 0.0
    passes_left: int = 0

    @property
    def n(self) -> int:
        """The number of images."""
        return len(self.fell_to)

    @property
    def clean(self) -> int:
        """The images that are right without an attack."""
        return sum(name != CLEAN for name in self.fell_to)

    @property
    def robust(self) -> int:
        """The images that no attack so far has changed."""
        return sum(name is None for name in self.fell_to)

    @property
    def accuracy(self) -> float:
        """The robust accuracy so far, in per cent."""
        return 100 * self.robust / self.n


@dataclass
class Stage:
    """One attack of the set; `rank` of its target: 0 is the most likely label except y."""

    name: str
    attack: Attack
    rank: int | None = None

    @property
    def forward_passes(self) -> int:
        """Forward passes for an image that does not fall, less a few."""
        per_step = 2 if isinstance(self.attack, FAB) else getattr(self.attack, "eot", 1)
        return self.attack.restarts * self.attack.steps * per_step


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """The standard set of attacks, or "rand" for randomised networks (APGD-CE and DLR, EOT 20).

    epsilon: in the unit of `pixels`; steps: of APGD and FAB; queries: of Square; targets: per
    image, of the targeted attacks; seed: of all random numbers; batch_size: images in one unit of
    work. Results follow from seed and batch_size, whether or not an evaluation is interrupted.
    In l_1, APGD searches in larger balls first, on CE five times, on DLR towards five targets.

    Raises:
        ValueError: an unknown norm or version, or an epsilon that is not positive.
    """

    norm: str = "linf"
    epsilon: float = 8.0
    version: str = "standard"
    pixels: InputScale = InputScale("255")
    steps: int = 100
    queries: int = 5000
    targets: int = 9
    eot: int = 20
    batch_size: int = 100
    seed: int = 0

    def __post_init__(self):
        if self.version not in VERSIONS:
            raise ValueError(f"unknown version {self.version!r}: one of {', '.join(VERSIONS)}")
        self.stages(10)  # the attacks check norm and epsilon

    def stages(self, num_classes: int) -> list[Stage]:
        """The attacks in their order, for a network of `num_classes` classes."""
        common = {"norm": self.norm, "epsilon": self.epsilon, "pixels": self.pixels}
        apgd = common | {"steps": self.steps, "multi_epsilon": self.norm == "l1"}
        if self.version == "rand":
            apgd |= {"early_stop": False, "eot": self.eot}
            dlr = "dlr" if num_classes > 2 else "margin"
            return [Stage(f"apgd-{loss}", APGD(loss=loss, **apgd)) for loss in ("ce", dlr)]
        dlr = "dlr" if num_classes > 3 else "margin"
        l1, towards = self.norm == "l1", {"goal": "towards_target"}
        targeted = [
            (f"apgd-t ({dlr})", APGD(loss=dlr, **apgd, **towards), 5 if l1 else 9),
            ("fab-t", FAB(steps=self.steps, **common, **towards), 9),
        ]
        stages = [Stage("apgd-ce", APGD(loss="ce", restarts=5 if l1 else 1, **apgd))]
        for name, attack, targets in targeted:
            ranks = range(min(targets, self.targets, num_classes - 1))
            stages += [Stage(name, attack, rank) for rank in ranks]
        return [*stages, Stage("square", Square(steps=self.queries - 1, **common))]

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        progress: Progress | None = None,
        on_progress: Callable[[Progress, str], None] = lambda progress, name: None,
    ) -> Progress:
        """Attack x (N, C, ...) with labels y (N,) and return which image fell to which attack.

        progress: of an interrupted evaluation of the same images, to continue it.
        on_progress: called after each unit of work with the progress and the attack's name.

        Raises:
            ValueError: x is empty, does not fit the stated pixel range or the progress.
        """
        if len(x) == 0:
            raise ValueError("there are no images to attack")
        if progress is not None and progress.n != len(x):
            raise ValueError(f"the progress is of {progress.n} images, these are {len(x)}")
        self.pixels.check(x)
        if self.version == "standard" and is_randomised(model, x):
            warnings.warn("this model is randomised: use the version 'rand'", stacklevel=2)
        with frozen_eval_mode(model):
            self._run(CountedModel(model), x, y, progress := progress or Progress([]), on_progress)
        return progress

    def _run(self, model: CountedModel, x: Tensor, y: Tensor, p: Progress, on_progress) -> None:
        with torch.no_grad():
            logits = torch.cat([model(part) for part in x.split(self.batch_size)])
        if not p.fell_to:
            right = (logits.argmax(1) == y).tolist()
            p.fell_to, p.forward_passes = [None if r else CLEAN for r in right], model.images
        others, stages = other_labels(logits, y), self.stages(logits.shape[1])
        batches = torch.arange(len(x)).split(self.batch_size)
        p.attacks = list(dict.fromkeys(stage.name for stage in stages))
        p.units = len(stages) * len(batches)
        for number in range(p.done, p.units):
            stage, batch = stages[number // len(batches)], batches[number % len(batches)]
            left = [i for i in batch.tolist() if p.fell_to[i] is None]
            start, model.images = time.perf_counter(), 0
            if left:
                right = self._attack(model, stage, x[left], y[left], others[left], number)
                for i, still_right in zip(left, right, strict=True):
                    p.fell_to[i] = None if still_right else stage.name
            p.done, p.forward_passes = number + 1, p.forward_passes + model.images
            p.seconds += time.perf_counter() - start
            left = [sum(p.fell_to[i] is None for i in batch.tolist()) for batch in batches]
            units = ((stages[k // len(left)], left[k % len(left)]) for k in range(p.done, p.units))
            p.passes_left = sum(stage.forward_passes * n for stage, n in units)
            on_progress(p, stage.name)

    def _attack(
        self, model: CountedModel, stage: Stage, x: Tensor, y: Tensor, others: Tensor, number: int
    ) -> list[bool]:
        """Which of the images x (N, C, ...) are still right after one attack."""
        generator = torch.Generator().manual_seed(self.seed + 10**6 * number)
        target = None if stage.rank is None else others[:, stage.rank]
        x_adv = replace(stage.attack, generator=generator).perturb(model, x, y, target)
        return correct_under_attack(model, None, x_adv, y).tolist()


class CountedModel:
    """A model that counts the images passed through it."""

    def __init__(self, model: Model) -> None:
        self.model, self.images = model, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.model(x)


def other_labels(logits: Tensor, y: Tensor) -> Tensor:
    """The labels except y (N,), from the most to the least likely one: (N, K) -> (N, K - 1)."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    return order[order != y[:, None]].view(len(y), -1)
