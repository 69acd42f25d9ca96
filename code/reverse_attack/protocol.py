"""The evaluation: every attack against the classifier as it is and behind its reversal.

Croce et al., 2022: the same images and seeds everywhere, attacks that know of the defence, and for
each image the worst of them all.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deepvision.attacks.pgd import APGD, LOSSES, PGD, Attack, cross_entropy
from deepvision.attacks.square import Square
from reverse_attack.adaptive import DefenceAware, Defended
from reverse_attack.classifier import Classifier
from reverse_attack.contrastive import ContrastiveLoss
from reverse_attack.reversal import REVERSAL_FACTOR, Reversal, noise, pixels_of

WEIGHTS = (1.0, 10.0)  # lambda of the defence-aware attacks
BPDA = "BPDA + EOT"
FIRST_SQUARES = 0.8  # of the pixels, as in AutoAttack

Repair = Callable[[Tensor, int], Tensor]  # (pixels, seed) -> pixels


@dataclass(frozen=True)
class Budget:
    """How much work a protocol does: images, and steps of every loop."""

    n: int  # images of the static and transfer columns and of the controls
    n_adaptive: int  # the first of them, in the adaptive columns
    reversal: tuple[int, int]  # steps and views
    short: tuple[int, int]  # of the reversal that the adaptive columns attack
    draws: int  # of EOT
    pgd: int  # steps
    apgd: int
    aware: int
    bpda: int
    queries: int  # of Square against the classifier
    defended_queries: int


PROTOCOLS = {
    "quick": Budget(500, 100, (40, 4), (10, 2), 4, 20, 40, 20, 10, 300, 30),
    "full": Budget(1000, 1000, (40, 4), (40, 4), 20, 50, 100, 50, 50, 5000, 500),
}


@dataclass
class Cost:
    """Of an image; passes: forward and backward ones of the classifier."""

    passes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.passes + other.passes, self.seconds + other.seconds)


@dataclass
class Result:
    """Which attacked images are classified right `(n,)`: as they are, and after their repair."""

    static: Tensor
    defended: Tensor
    attack: Cost
    defence: Cost


AttackedBatch = tuple[Tensor, Cost]  # attacked images and what they cost
Table = dict[str, dict[str, Result]]  # by row, then by column


def now() -> float:
    """Seconds, once a GPU has done what it was given so far."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def cost_of(model: Classifier, images: int) -> Iterator[Cost]:
    """What a block costs for each of its images, known when it has ended."""
    cost, start = Cost(), now()

    def count(_, inputs, logits: Tensor) -> None:
        cost.passes += (2 if logits.requires_grad else 1) * len(logits) / images

    hook = model.register_forward_hook(count)
    try:
        yield cost
    finally:
        hook.remove()
        cost.seconds = (now() - start) / images


@dataclass(frozen=True)
class PublicAPGD:
    """torchattacks' APGD in l_inf, epsilon in /255, in the shape of an `Attack`."""

    epsilon: float
    steps: int
    generator: torch.Generator | None = None

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        import torchattacks

        seed = self.generator.initial_seed() % 2**32
        attack = torchattacks.APGD(model, eps=self.epsilon / 255, steps=self.steps, seed=seed)
        return attack(x, y).detach()


@dataclass
class Evaluation:
    """Fixed images x `(n, 3, H, W)`, y, a fixed defence, fixed seeds.

    epsilon: the attacks', in /255; the reversal has twice as much.
    """

    model: Classifier
    contrastive: ContrastiveLoss
    untrained: ContrastiveLoss
    x: Tensor
    y: Tensor
    size: Budget
    epsilon: float
    batchsize: int
    seed: int

    def run(self) -> tuple[Table, Table, Table]:
        """The plain table, the controls, the adaptive table; a line as each result is there."""
        full, short = self.reversal(self.size.reversal), self.reversal(self.size.short)
        examples = {"clean": (self.x, Cost())} | dict(self.static_examples())
        plain = {
            row: {"transfer": tell(row, "transfer", self.judge(made, full))}
            for row, made in examples.items()
        }
        controls = self.controls(examples["PGD-CE"])
        few = self.size.n_adaptive
        adaptive = {
            row: {"transfer": self.judge((x[:few], cost), short)}
            for row, (x, cost) in examples.items()
        }
        for row, column, made in self.adaptive_examples(short):
            adaptive[row][column] = tell(row, column, self.judge(made, short))
        return plain, controls, adaptive

    # ---- the defence

    def reversal(self, size: tuple[int, int], loss: ContrastiveLoss | None = None) -> Reversal:
        steps, n_views = size
        loss = (loss or self.contrastive).on_views(n_views)
        return Reversal(loss, "linf", REVERSAL_FACTOR * self.epsilon, steps=steps)

    def judge(self, made: AttackedBatch, repair: Repair) -> Result:
        """The classifier's answers to attacked images, as they are and after `repair`."""
        x, attack = made
        return self.compare(x, attack, lambda part, seed: repair(x[part], seed))

    def compare(self, x: Tensor, attack: Cost, repaired: Callable[[slice, int], Tensor]) -> Result:
        with cost_of(self.model, len(x)) as cost:
            after = self.in_batches(repaired, len(x))
        return Result(self.is_right(x), self.is_right(after), attack, cost)

    @torch.no_grad()
    def is_right(self, x: Tensor) -> Tensor:
        answers = self.in_batches(lambda part, _: self.model(x[part]).argmax(1), len(x))
        return answers == self.y[: len(x)]

    def in_batches(self, function: Callable[[slice, int], Tensor], n: int) -> Tensor:
        """Of the first n images, by `function(slice, seed)`: an image's seed is always the same."""
        starts = range(0, n, self.batchsize)
        parts = [(slice(i, min(i + self.batchsize, n)), self.seed + i) for i in starts]
        return torch.cat([function(part, seed) for part, seed in parts])

    def controls(self, attacked: AttackedBatch) -> Table:
        """Other changes of the same radius to images that PGD attacked; and to clean ones."""
        radius = REVERSAL_FACTOR * self.epsilon
        untrained = self.reversal(self.size.reversal, self.untrained)

        def noisy(x: Tensor, seed: int) -> Tensor:
            return noise(x, "linf", radius, seed)

        labels = PGD(
            epsilon=radius,
            step_size=radius / 8,
            steps=self.size.reversal[0],
            loss=lambda logits, y, t: -cross_entropy(logits, y, t),
            pixels=pixels_of("linf"),
        )
        x, cost = attacked

        def told(part: slice, seed: int) -> Tensor:
            return labels.perturb(self.model, x[part], self.y[part])

        results = {
            "noise, clean images": self.judge((self.x, Cost()), noisy),
            "noise": self.judge(attacked, noisy),
            "untrained head": self.judge(attacked, untrained),
            "true label (ceiling)": self.compare(x, cost, told),
        }
        return {row: {"control": tell(row, "control", r)} for row, r in results.items()}

    # ---- attacks

    def gradient_attacks(self) -> dict[str, Attack]:
        """By row; their numbers of steps are those against the classifier as it is."""
        common = {"epsilon": self.epsilon, "pixels": pixels_of("linf"), "random_start": True}
        return {
            "PGD-CE": PGD(loss="ce", steps=self.size.pgd, **common),
            "PGD-margin": PGD(loss="margin", steps=self.size.pgd, **common),
            "APGD-CE": APGD(loss="ce", steps=self.size.apgd, early_stop=False, **common),
        }

    def square(self, queries: int) -> Square:
        return Square(
            epsilon=self.epsilon, pixels=pixels_of("linf"), steps=queries - 1, share=FIRST_SQUARES
        )

    def static_examples(self) -> Iterator[tuple[str, AttackedBatch]]:
        """Made on the classifier as it is, from all images."""
        for row, attack in self.gradient_attacks().items():
            yield row, self.perturb(attack, self.model, len(self.x))
        yield "Square", self.perturb(self.square(self.size.queries), self.model, len(self.x))
        if importlib.util.find_spec("torchattacks"):
            public = PublicAPGD(self.epsilon, self.size.apgd)
            yield "APGD-CE, torchattacks", self.perturb(public, self.model, len(self.x))

    def adaptive_examples(self, reversal: Reversal) -> Iterator[tuple[str, str, AttackedBatch]]:
        """Made by attacks that know of the reversal, from the first images: row, column, images."""
        few, seed = self.size.n_adaptive, self.seed
        for row, attack in self.gradient_attacks().items():
            for weight in WEIGHTS:
                loss = LOSSES[attack.loss]
                aware = DefenceAware(self.model, reversal.loss, loss, weight, seed).eval()
                adapted = replace(attack, steps=self.size.aware, loss=aware.joint_loss)
                yield row, f"aware, λ = {weight:g}", self.perturb(adapted, aware, few)
            defended = Defended(self.model, reversal, self.size.draws, seed).eval()
            adapted = replace(attack, steps=self.size.bpda)
            yield row, BPDA, self.perturb(adapted, defended, few)
        defended = Defended(self.model, reversal, 1, seed).eval()
        # against draws that differ, one success is no reason to stop
        square = replace(self.square(self.size.defended_queries), early_stop=False)
        yield "Square", "queries", self.perturb(square, defended, few)

    def perturb(self, attack: Attack | PublicAPGD, model: nn.Module, n: int) -> AttackedBatch:
        def one_batch(part: slice, seed: int) -> Tensor:
            seeded = replace(attack, generator=torch.Generator().manual_seed(seed))
            return seeded.perturb(model, self.x[part], self.y[part]).clamp(0, 1)

        with cost_of(self.model, n) as cost:
            x = self.in_batches(one_batch, n)
        return x, cost


def tell(row: str, column: str, result: Result) -> Result:
    """Print a line as soon as there is a result, and pass it on."""
    static, defended = (100 * v.float().mean() for v in (result.static, result.defended))
    seconds = result.attack.seconds + result.defence.seconds
    print(
        f"{row:<20} {column:<14} alone {static:5.1f} %, reversed {defended:5.1f} %, "
        f"n = {len(result.static)}, {seconds:.2f} s an image",
        flush=True,
    )
    return result
