"""The pictures of Part IV, to results/reverse_*.png and to TensorBoard. From code/:

python reverse_attack/figures.py
python reverse_attack/figures.py --only iterations loss_curve
"""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # as a script: modules are found from code/, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from deepvision.attacks.diagnostics import wilson
from deepvision.attacks.pgd import PGD, cross_entropy
from deepvision.checkpoint import write_atomically
from deepvision.config import at_least
from deepvision.runtime import run_logger
from reverse_attack import classifier, data, head_training, heads, options
from reverse_attack.attack_sets import NORMS
from reverse_attack.classifier import Classifier
from reverse_attack.contrastive import SIMILARITIES, ContrastiveLoss
from reverse_attack.reversal import BUDGETS, Reversal, pixels_of
from utils import UserError, relpath

RESULTS = Path(__file__).resolve().parents[2] / "results"
ITERATIONS = (0, 5, 10, 15)
LAST_ITERATION = 20
SHOWN = 6  # images of a picture
SHORT = (10, 2)  # steps and views of the reversals that figures need many of
BATCH_SIZES = (32, 128, 512)
HEAD_STEPS = 600
NUMBERS = ("loss_curve", "heads_compared")  # figures whose numbers are kept beside them


def parse(argv: list[str] | None) -> Namespace:
    parser = options.parser("Draw what the attacks and their reversal do.", 100)
    add = parser.add_argument
    add("--head", metavar="FILE", help="instead of the newest head of this classifier")
    add("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="these figures")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="for the .png files")
    add("--head_images", type=at_least(int, 2), default=4000, help="that heads are trained on")
    args = parser.parse_args(argv)
    args.limit = args.limit or 200
    return args


@dataclass
class Subject:
    """What all figures look at."""

    args: Namespace
    model: Classifier
    contrastive: ContrastiveLoss
    x: Tensor
    y: Tensor
    device: torch.device

    def attack(self, norm: str, steps: int, loss=cross_entropy) -> PGD:
        """From the clean image, in steps of a quarter of epsilon, so that runs share their path."""
        epsilon = BUDGETS[norm]
        return PGD(
            norm=norm,
            epsilon=epsilon,
            steps=steps,
            step_size=epsilon / 4,
            loss=loss,
            pixels=pixels_of(norm),
        )

    def attacked(self, norm: str, steps: int, loss=cross_entropy) -> Tensor:
        """All images attacked, a batch at a time."""
        attack = self.attack(norm, steps, loss)
        parts = zip(self.batches(self.x), self.batches(self.y), strict=True)
        return torch.cat([attack.perturb(self.model, x, y) for x, y in parts])

    def reverse(self, x: Tensor, loss: ContrastiveLoss | None = None) -> Tensor:
        steps, n_views = SHORT
        reversal = Reversal((loss or self.contrastive).on_views(n_views), steps=steps)
        parts = enumerate(self.batches(x), self.args.seed)
        return torch.cat([reversal(part, seed) for seed, part in parts])

    def batches(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.args.batchsize)


def iterations(subject: Subject) -> dict:
    """Attacked images `(iterations, SHOWN, 3, H, W)` for each norm."""
    x, y = subject.x[:SHOWN], subject.y[:SHOWN]
    return {
        name: torch.stack(
            [subject.attack(norm, k).perturb(subject.model, x, y) for k in ITERATIONS]
        ).cpu()
        for name, norm in NORMS.items()
    }


def loss_curve(subject: Subject) -> dict:
    """The mean test loss at each iteration, for each norm."""
    curves = {}
    for name, norm in NORMS.items():
        seen = []

        def recorded(logits: Tensor, y: Tensor, t: Tensor | None, seen=seen) -> Tensor:
            loss = cross_entropy(logits, y, t)
            seen.append(loss.sum().item())
            return loss

        subject.attacked(norm, LAST_ITERATION + 1, recorded)  # a step sees the one before
        by_batch = torch.tensor(seen).view(-1, LAST_ITERATION + 1)
        curves[name] = (by_batch.sum(0) / len(subject.x)).tolist()
    return curves


def vectors(subject: Subject) -> dict:
    """Original, attack vector, attacked, reversal vector, recovered: each `(SHOWN, 3, H, W)`."""
    x, y = subject.x[:SHOWN], subject.y[:SHOWN]
    attacked = subject.attack("linf", 10).perturb(subject.model, x, y)
    recovered = subject.reverse(attacked)
    return {
        "original": x.cpu(),
        "attack vector": (attacked - x).cpu(),
        "attacked": attacked.cpu(),
        "reversal vector": (recovered - attacked).cpu(),
        "recovered": recovered.cpu(),
    }


@torch.no_grad()
def held_out_loss(subject: Subject, x: Tensor, draws: int = 4) -> Tensor:
    """The contrastive loss of each image, averaged over views that no reversal has seen."""
    loss = subject.contrastive
    loss.generator.manual_seed(subject.args.seed + 1)
    drawn = [torch.cat([loss(part) for part in subject.batches(x)]) for _ in range(draws)]
    return torch.stack(drawn).mean(0).cpu()


def loss_histogram(subject: Subject) -> dict:
    """The contrastive loss of clean, attacked and reversed images on held-out views."""
    attacked = subject.attacked("linf", 10)
    kinds = {
        "clean": subject.x,
        "attacked": attacked,
        "attacked, reversed": subject.reverse(attacked),
        "clean, reversed": subject.reverse(subject.x),
    }
    return {name: held_out_loss(subject, x).tolist() for name, x in kinds.items()}


def heads_compared(subject: Subject) -> list[dict]:
    """Heads by similarity and batch size: held-out loss, accuracy on reversed attacked images."""
    args, model, device = subject.args, subject.model, subject.device
    listing = data.list_images(args.dataset, args.data_root, "train")
    train, val = listing.split(args.seed, args.head_images)
    cached = head_training.features_of_views(model, train, 4, args.seed, device)
    features = head_training.ViewFeatures(model, train, 4, device, cached)
    held_out = head_training.features_of_views(model, val, 4, args.seed + 1, device)
    attacked = subject.attacked("linf", 10)
    rows = []
    for similarity in SIMILARITIES:
        for batchsize in BATCH_SIZES:
            epochs = max(1, HEAD_STEPS * batchsize // len(train))
            fitted = head_training.fit(
                features, similarity, epochs, batchsize, 1e-3, "Adam", args.seed
            )
            *_, (head, _) = fitted
            loss = head_training.held_out_loss(head, held_out, similarity)
            bank = subject.contrastive.bank
            contrastive = ContrastiveLoss(model, head.eval(), similarity, 2, bank)
            recovered = subject.batches(subject.reverse(attacked, contrastive))
            with torch.no_grad():
                answers = torch.cat([model(part).argmax(1) for part in recovered])
            hits, n = (answers == subject.y).sum().item(), len(answers)
            rows.append(
                {
                    "similarity": similarity,
                    "batchsize": batchsize,
                    "held_out_loss": loss,
                    "reversed": 100 * hits / n,
                    "interval": wilson(hits, n),
                    "n": n,
                }
            )
            print(f"{similarity}, batch {batchsize}: loss {loss:.3f}, reversed {hits}/{n}")
    return rows


FIGURES = {f.__name__: f for f in (iterations, loss_curve, vectors, loss_histogram, heads_compared)}


def draw(subject: Subject, names: list[str], folder: Path, book: run_logger.RunLogger) -> None:
    """Measure and plot these figures; each becomes a PNG and a picture in TensorBoard."""
    from reverse_attack import plots

    plotted = {
        "iterations": lambda found: plots.iterations(found, ITERATIONS),
        "loss_curve": lambda found: plots.loss_curve(found, len(subject.x)),
        "vectors": plots.vectors,
        "loss_histogram": plots.loss_histogram,
        "heads_compared": plots.heads_compared,
    }
    kept = folder / "reverse_figures.json"
    numbers = json.loads(kept.read_text()) if kept.exists() else {}
    for name in names:
        found = FIGURES[name](subject)
        if name in NUMBERS:
            numbers[name] = options.provenance(subject.args, subject.device) | {"found": found}
        fig = plotted[name](found)
        path = folder / f"reverse_{name}.png"
        fig.savefig(path, dpi=plots.DPI)
        fig.canvas.draw()
        pixels = torch.from_numpy(plots.pixels(fig)).permute(2, 0, 1).float() / 255
        book.add_image(f"Reverse/{name}", pixels, 0)
        print(f"{path.name} is drawn", flush=True)
    write_atomically(kept, (json.dumps(numbers, indent=1) + "\n").encode())


def figures(args: Namespace) -> None:
    if not importlib.util.find_spec("matplotlib"):
        raise UserError("the figures need matplotlib: pip install matplotlib")
    options.writable(args.results)
    device = options.choose_device(args.device)
    listing = data.list_images(args.dataset, args.data_root, "test")
    trained = classifier.from_args(args, len(listing.classes), device)
    contrastive = heads.from_args(args, trained).loss(trained, 4)
    images = listing.sample(args.seed, args.limit)
    subject = Subject(
        args,
        trained.model,
        contrastive,
        data.as_pixels(images.x).to(device),
        images.y.to(device),
        device,
    )
    folder = run_logger.run_dir_of(trained.path) or run_logger.new_run("figures")
    with run_logger.RunLogger(folder) as book:
        draw(subject, args.only, args.results, book)
    there, events = map(relpath, (args.results, folder))
    print(f"Pictures: {there}; tensorboard --logdir={events}")


def main(argv: list[str] | None = None) -> int:
    return options.run(figures, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
