"""The evaluation: every attack on the classifier alone and behind its reversal.

Croce et al., 2022: the same images and seeds for all attacks, attacks that know the defence, and
for each image the worst case over all attacks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deepvision.attacks import APGD, LOSSES, PGD, Attack, Square
from deepvision.attacks.losses import cross_entropy
from reverse_attack.adaptive import DefenceAware, Defended
from reverse_attack.classifier import Classifier
from reverse_attack.contrastive import ContrastiveLoss
from reverse_attack.cost import Cost, measure_cost
from reverse_attack.reversal import REVERSAL_FACTOR, Reversal, add_noise, input_scale

WEIGHTS = (1.0, 10.0)  # lambda of the defence-aware attacks
BPDA, KNOWN_VIEWS = "BPDA + EOT", "BPDA, known views"

Defence = Callable[[Tensor, int], Tensor]  # (images, seed) -> images


@dataclass(frozen=True)
class Budget:
    """The work of a protocol: images, and steps of every loop."""

    n: int  # images of the transfer column and of the controls
    n_adaptive: int  # the first of them, for the adaptive columns
    reversal: tuple[int, int]  # steps and views
    short: tuple[int, int]  # of the reversal that the adaptive columns attack
    draws: int  # of EOT
    pgd: int  # steps
    apgd: int
    aware: int
    bpda: int
    queries: int  # of Square on the classifier alone
    defended_queries: int
    dlr: bool = False  # APGD on the DLR loss too
    known_views: bool = False  # the column of deterministic BPDA


PROTOCOLS = {
    "quick": Budget(500, 100, (40, 4), (10, 2), 4, 20, 40, 20, 10, 300, 30),
    "full": Budget(1000, 1000, (40, 4), (40, 4), 20, 50, 100, 50, 50, 5000, 500, True, True),
}


@dataclass
class Result:
    """Which attacked images are classified correctly (n,): alone, and behind the defence."""

    static: Tensor
    defended: Tensor
    attack: Cost
    defence: Cost


AttackedBatch = tuple[Tensor, Cost]  # attacked images and the cost of the attack
Table = dict[str, dict[str, Result]]  # by row, then by column


@dataclass(frozen=True)
class PublicAPGD:
    """torchattacks' APGD in l_inf with the interface of an `Attack`; epsilon in 1/255."""

    epsilon: float
    steps: int
    generator: torch.Generator | None = None

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Attacked images (N, 3, H, W)."""
        import torchattacks

        seed = self.generator.initial_seed() % 2**32
        attack = torchattacks.APGD(model, eps=self.epsilon / 255, steps=self.steps, seed=seed)
        return attack(x, y).detach()


@dataclass
class Evaluator:
    """All attacks and controls on fixed images, with fixed seeds.

    x, y: images (n, 3, H, W) in [0, 1] and labels (n,), on the device of the model.
    untrained: the contrastive loss of an untrained head.
    epsilon: radius of the attacks, in 1/255; that of the reversal is twice as large.
    random_start: of the reversal.
    """

    model: Classifier
    contrastive: ContrastiveLoss
    untrained: ContrastiveLoss
    x: Tensor
    y: Tensor
    budget: Budget
    epsilon: float
    batch_size: int
    seed: int
    random_start: bool = False

    def run(self) -> tuple[Table, Table, Table]:
        """The transfer table, the controls, the adaptive table; prints each result."""
        full, short = self.reversal(self.budget.reversal), self.reversal(self.budget.short)
        attacked = {"clean": (self.x, Cost())} | dict(self.static_attacks())
        transfer = {
            row: {"transfer": print_result(row, "transfer", self.evaluate(batch, full))}
            for row, batch in attacked.items()
        }
        controls = self.controls(attacked["PGD-CE"])
        n = self.budget.n_adaptive
        adaptive = {
            row: {"transfer": self.evaluate((x[:n], cost), short)}
            for row, (x, cost) in attacked.items()
        }
        for row, column, batch in self.adaptive_attacks(short):
            adaptive[row][column] = print_result(row, column, self.evaluate(batch, short))
        return transfer, controls, adaptive

    # ---- the defence

    def reversal(
        self, steps_and_views: tuple[int, int], loss: ContrastiveLoss | None = None
    ) -> Reversal:
        """A reversal with the trained head, or with another contrastive loss."""
        steps, n_views = steps_and_views
        loss = (loss or self.contrastive).on_views(n_views)
        radius = REVERSAL_FACTOR * self.epsilon
        return Reversal(loss, "linf", radius, steps=steps, random_start=self.random_start)

    def evaluate(self, attacked: AttackedBatch, defence: Defence) -> Result:
        """The predictions for attacked images, alone and behind the defence."""
        x, attack = attacked
        return self.compare(x, attack, lambda part, seed: defence(x[part], seed))

    def compare(self, x: Tensor, attack: Cost, defend: Callable[[slice, int], Tensor]) -> Result:
        """The same, for a defence that is given the slice of its images."""
        with measure_cost(self.model, len(x)) as cost:
            after = self.in_batches(defend, len(x))
        return Result(self.correct(x), self.correct(after), attack, cost)

    @torch.no_grad()
    def correct(self, x: Tensor) -> Tensor:
        """Where (n,) the prediction for x (n, 3, H, W), the first images, is their label."""
        predictions = self.in_batches(lambda part, _: self.model(x[part]).argmax(1), len(x))
        return predictions == self.y[: len(x)]

    def in_batches(self, function: Callable[[slice, int], Tensor], n: int) -> Tensor:
        """`function(slice, seed)` over the first n images; an image's seed is always the same."""
        starts = range(0, n, self.batch_size)
        parts = [(slice(i, min(i + self.batch_size, n)), self.seed + i) for i in starts]
        return torch.cat([function(part, seed) for part, seed in parts])

    def controls(self, attacked: AttackedBatch) -> Table:
        """Other changes of the same radius to images that PGD attacked, and to clean ones."""
        radius = REVERSAL_FACTOR * self.epsilon
        untrained = self.reversal(self.budget.reversal, self.untrained)

        def noise(x: Tensor, seed: int) -> Tensor:
            return add_noise(x, "linf", radius, seed)

        descent = PGD(
            epsilon=radius,
            step_size=radius / 8,
            steps=self.budget.reversal[0],
            loss=lambda logits, y, t: -cross_entropy(logits, y, t),
            pixels=input_scale("linf"),
        )
        x, cost = attacked

        def use_labels(part: slice, seed: int) -> Tensor:
            return descent.perturb(self.model, x[part], self.y[part])

        results = {
            "noise, clean images": self.evaluate((self.x, Cost()), noise),
            "noise": self.evaluate(attacked, noise),
            "untrained head": self.evaluate(attacked, untrained),
            "true label (ceiling)": self.compare(x, cost, use_labels),
        }
        return {row: {"control": print_result(row, "control", r)} for row, r in results.items()}

    # ---- attacks

    def gradient_attacks(self) -> dict[str, Attack]:
        """By row; with the numbers of steps for the classifier alone."""
        common = {"epsilon": self.epsilon, "pixels": input_scale("linf"), "random_start": True}
        apgd = {"steps": self.budget.apgd, "early_stop": False, **common}
        attacks = {
            "PGD-CE": PGD(loss="ce", steps=self.budget.pgd, **common),
            "PGD-margin": PGD(loss="margin", steps=self.budget.pgd, **common),
            "APGD-CE": APGD(loss="ce", **apgd),
        }
        return attacks | ({"APGD-DLR": APGD(loss="dlr", **apgd)} if self.budget.dlr else {})

    def square(self, queries: int) -> Square:
        """Square with this number of queries."""
        scale = input_scale("linf")
        return Square(epsilon=self.epsilon, pixels=scale, steps=queries - 1)

    def static_attacks(self) -> Iterator[tuple[str, AttackedBatch]]:
        """Attacks on the classifier alone, on all images."""
        for row, attack in self.gradient_attacks().items():
            yield row, self.perturb(attack, self.model, len(self.x))
        yield "Square", self.perturb(self.square(self.budget.queries), self.model, len(self.x))
        if importlib.util.find_spec("torchattacks"):
            public = PublicAPGD(self.epsilon, self.budget.apgd)
            yield "APGD-CE, torchattacks", self.perturb(public, self.model, len(self.x))

    def adaptive_attacks(self, reversal: Reversal) -> Iterator[tuple[str, str, AttackedBatch]]:
        """Attacks that know the reversal, on the first images: row, column, attacked images."""
        n, seed = self.budget.n_adaptive, self.seed
        for row, attack in self.gradient_attacks().items():
            for weight in WEIGHTS:
                loss = LOSSES[attack.loss]
                aware = DefenceAware(self.model, reversal.loss, loss, weight, seed).eval()
                adapted = replace(attack, steps=self.budget.aware, loss=aware.joint_loss)
                yield row, f"aware, λ = {weight:g}", self.perturb(adapted, aware, n)
            adapted = replace(attack, steps=self.budget.bpda)
            defended = Defended(self.model, reversal, self.budget.draws, seed).eval()
            yield row, BPDA, self.perturb(adapted, defended, n)
            if self.budget.known_views:
                yield row, KNOWN_VIEWS, self.perturb(adapted, self.known_views(reversal), n)
        defended = Defended(self.model, reversal, 1, seed).eval()
        # views differ between queries: one success is no reason to stop
        square = replace(self.square(self.budget.defended_queries), early_stop=False)
        yield "Square", "queries", self.perturb(square, defended, n)

    def known_views(self, reversal: Reversal) -> Callable[[int], Defended]:
        """For each batch's seed, the defence with the very views that `evaluate` will draw."""
        return lambda seed: Defended(self.model, reversal, fixed_seed=seed).eval()

    def perturb(
        self,
        attack: Attack | PublicAPGD,
        target: nn.Module | Callable[[int], nn.Module],
        n: int,
    ) -> AttackedBatch:
        """The first n images attacked. target: a model, or a function of the batch's seed."""

        def one_batch(part: slice, seed: int) -> Tensor:
            model = target if isinstance(target, nn.Module) else target(seed)
            seeded = replace(attack, generator=torch.Generator().manual_seed(seed))
            return seeded.perturb(model, self.x[part], self.y[part]).clamp(0, 1)

        with measure_cost(self.model, n) as cost:
            x = self.in_batches(one_batch, n)
        return x, cost


def print_result(row: str, column: str, result: Result) -> Result:
    """Print a result as soon as it is known, and return it."""
    static, defended = (100 * v.float().mean() for v in (result.static, result.defended))
    cost = result.attack + result.defence
    print(
        f"{row:<20} {column:<17} alone {static:5.1f} %, reversed {defended:5.1f} %, "
        f"n = {len(result.static)}; per image {cost.forward:.0f} forward passes, "
        f"{cost.seconds:.2f} s",
        flush=True,
    )
    return result
