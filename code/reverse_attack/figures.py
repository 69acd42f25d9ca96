"""Draw the figures of Part IV to results/reverse_*.png and to TensorBoard. From code/:

python reverse_attack/figures.py
python reverse_attack/figures.py --only iterations loss_curve
"""

from __future__ import annotations

import signal

INTERRUPT = signal.getsignal(signal.SIGINT)
if __name__ == "__main__":  # Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib.util
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # as a script: modules are found from code/, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from deepvision.attacks import PGD
from deepvision.attacks.losses import cross_entropy
from deepvision.config import at_least
from deepvision.evaluation.statistics import wilson
from deepvision.runtime.atomic import write_atomically
from deepvision.runtime.console import script
from deepvision.runtime.jsonl import read_json
from deepvision.runtime.provenance import ROOT
from deepvision.runtime.run_dir import LOGS, new_run_dir, run_dir_of
from deepvision.runtime.run_logger import RunLogger
from reverse_attack import classifier, data, head_training, heads, options
from reverse_attack.attack_sets import NORMS
from reverse_attack.classifier import Classifier
from reverse_attack.contrastive import SIMILARITIES, ContrastiveLoss, Head
from reverse_attack.reversal import BUDGETS, Reversal, input_scale
from utils import UserError, relpath

RESULTS = ROOT / "results"
ITERATIONS = (0, 5, 10, 15)
LAST_ITERATION = 20
SHOWN = 6  # images per strip
SHORT = (10, 2)  # steps and views of the reversals, of which the figures need many
BATCH_SIZES = (32, 128, 512)
HEAD_STEPS = 600
NUMBERS = ("loss_curve", "heads_compared")  # figures whose numbers are stored too


def parse(argv: Sequence[str]) -> Namespace:
    """Read the command line."""
    parser = options.make_parser(__doc__, 100)
    parser.set_defaults(limit=200)
    add = parser.add_argument
    add("--head", metavar="FILE", help="default: the newest head of this classifier")
    add("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="these figures")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="for the .png files")
    add("--head-images", type=at_least(int, 2), default=4000, help="training images of the heads")
    return options.parse(parser, argv, "figures.py")


@dataclass
class Subject:
    """The images x (n, 3, H, W), y (n,) and the networks of all figures."""

    args: Namespace
    model: Classifier
    contrastive: ContrastiveLoss
    x: Tensor
    y: Tensor

    def attack(self, norm: str, steps: int, loss=cross_entropy) -> PGD:
        """PGD from the clean image in steps of epsilon / 4: runs differ in their length only."""
        epsilon = BUDGETS[norm]
        return PGD(
            norm=norm,
            epsilon=epsilon,
            steps=steps,
            step_size=epsilon / 4,
            loss=loss,
            pixels=input_scale(norm),
        )

    def attacked(self, norm: str, steps: int, loss=cross_entropy) -> Tensor:
        """All images (n, 3, H, W) under attack."""
        attack = self.attack(norm, steps, loss)
        parts = zip(self.batches(self.x), self.batches(self.y), strict=True)
        return torch.cat([attack.perturb(self.model, x, y) for x, y in parts])

    def reverse(self, x: Tensor, loss: ContrastiveLoss | None = None) -> Tensor:
        """The reversal of images (n, 3, H, W), with the trained head or another loss."""
        steps, n_views = SHORT
        reversal = Reversal((loss or self.contrastive).on_views(n_views), steps=steps)
        parts = enumerate(self.batches(x), self.args.seed)
        return torch.cat([reversal(part, seed) for seed, part in parts])

    def batches(self, x: Tensor) -> tuple[Tensor, ...]:
        """x in batches of --batch-size."""
        return x.split(self.args.batch_size)


def iterations(subject: Subject) -> dict:
    """Attacked images (iterations, SHOWN, 3, H, W) for each norm."""
    x, y = subject.x[:SHOWN], subject.y[:SHOWN]
    return {
        name: torch.stack(
            [subject.attack(norm, k).perturb(subject.model, x, y) for k in ITERATIONS]
        ).cpu()
        for norm, name in NORMS.items()
    }


def loss_curve(subject: Subject) -> dict:
    """The mean test loss at each iteration, for each norm."""
    curves = {}
    for norm, name in NORMS.items():
        sums = []

        def recorded(logits: Tensor, y: Tensor, t: Tensor | None, sums=sums) -> Tensor:
            loss = cross_entropy(logits, y, t)
            sums.append(loss.sum().item())
            return loss

        subject.attacked(norm, LAST_ITERATION + 1, recorded)  # a loss is that before its step
        by_batch = torch.tensor(sums).view(-1, LAST_ITERATION + 1)
        curves[name] = (by_batch.sum(0) / len(subject.x)).tolist()
    return curves


def vectors(subject: Subject) -> dict:
    """Original, attack vector, attacked, reversal vector, recovered: each (SHOWN, 3, H, W)."""
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
    """The contrastive loss (n,) of x (n, 3, H, W), averaged over views of no reversal."""
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
    args, model = subject.args, subject.model
    index = data.list_images(args.dataset, args.data_root, "train")
    train, val = index.split(args.seed, args.head_images)
    cached = head_training.view_features(model, train, 4, args.seed)
    features = head_training.ViewFeatures(model, train, 4, cached)
    held_out = head_training.view_features(model, val, 4, args.seed + 1)
    attacked = subject.attacked("linf", 10)
    rows = []
    for similarity in SIMILARITIES:
        for batch_size in BATCH_SIZES:
            epochs = max(1, HEAD_STEPS * batch_size // len(train))
            *_, (head, _) = head_training.fit(
                features, similarity, epochs, batch_size, 1e-3, "Adam", args.seed
            )
            row = {"similarity": similarity, "batchsize": batch_size}
            row["held_out_loss"] = head_training.held_out_loss(head, held_out, similarity)
            row |= reversed_accuracy(subject, attacked, head, similarity)
            rows.append(row)
            print(
                f"{similarity}, batch {batch_size}: loss {row['held_out_loss']:.3f}, "
                f"reversed {row['reversed']:.1f} % of {row['n']}"
            )
    return rows


def reversed_accuracy(subject: Subject, attacked: Tensor, head: Head, similarity: str) -> dict:
    """Accuracy in per cent on attacked images (n, 3, H, W) after reversal with this head."""
    model, bank = subject.model, subject.contrastive.bank
    contrastive = ContrastiveLoss(model, head.eval(), similarity, 2, bank)
    recovered = subject.batches(subject.reverse(attacked, contrastive))
    with torch.no_grad():
        predictions = torch.cat([model(part).argmax(1) for part in recovered])
    hits, n = (predictions == subject.y).sum().item(), len(predictions)
    return {"reversed": 100 * hits / n, "interval": wilson(hits, n), "n": n}


FIGURES = {f.__name__: f for f in (iterations, loss_curve, vectors, loss_histogram, heads_compared)}


def draw(subject: Subject, names: list[str], folder: Path, logger: RunLogger) -> None:
    """Measure and plot these figures; each becomes a PNG and an image in TensorBoard."""
    from reverse_attack import plots

    plotted = {
        "iterations": lambda found: plots.iterations(found, ITERATIONS),
        "loss_curve": lambda found: plots.loss_curve(found, len(subject.x)),
        "vectors": plots.vectors,
        "loss_histogram": plots.loss_histogram,
        "heads_compared": plots.heads_compared,
    }
    numbers_path = folder / "reverse_figures.json"
    numbers = read_json(numbers_path)
    for name in names:
        found = FIGURES[name](subject)
        if name in NUMBERS:
            numbers[name] = options.record(subject.args) | {"found": found}
        fig = plotted[name](found)
        path = folder / f"reverse_{name}.png"
        fig.savefig(path, dpi=plots.DPI)
        fig.canvas.draw()
        pixels = torch.from_numpy(plots.pixels(fig)).permute(2, 0, 1).float() / 255
        logger.add_image(f"Reverse/{name}", pixels, 0)
        print(f"Drawn: {path.name}", flush=True)
    write_atomically(numbers_path, (json.dumps(numbers, indent=1) + "\n").encode())


def figures(args: Namespace) -> None:
    """Draw the figures of the command line."""
    if not importlib.util.find_spec("matplotlib"):
        raise UserError("the figures need matplotlib: pip install matplotlib")
    options.require_writable(args.results)
    index = data.list_images(args.dataset, args.data_root, "test")
    loaded = classifier.from_args(args, len(index.classes))
    contrastive = heads.from_args(args, loaded).contrastive_loss(loaded, 4)
    images = index.sample(args.seed, args.limit)
    x, y = data.as_pixels(images.x).to(args.device), images.y.to(args.device)
    subject = Subject(args, loaded.model, contrastive, x, y)
    run_dir = run_dir_of(loaded.path, args.logs) or new_run_dir(args.logs, "figures")
    with RunLogger(run_dir) as logger:
        draw(subject, args.only, args.results, logger)
    print(f"Figures: {relpath(args.results)}; tensorboard --logdir={relpath(run_dir)}")


def main(argv: Sequence[str] | None = None, logs: Path = LOGS) -> int:
    """Run one command line; return the exit code. logs: where run folders are."""
    return options.run(figures, parse(sys.argv[1:] if argv is None else argv), logs)


if __name__ == "__main__":
    with script(INTERRUPT):
        sys.exit(main())
