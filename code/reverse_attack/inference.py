"""Accuracy on clean or attacked images, without or with their reversal. From code/:

python reverse_attack/inference.py --norm clean                    # also l_1, l_2, l_inf
python reverse_attack/inference.py --task SSL --norm l_inf         # reversed first
python reverse_attack/inference.py --task random --norm l_inf      # noise of the same radius first
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # as a script: modules are found from code/, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from deepvision.config import at_least
from deepvision.runtime import run_logger
from reverse_attack import attack_sets, classifier, data, heads, options
from reverse_attack.attack_sets import NORMS
from reverse_attack.classifier import LoadedClassifier
from reverse_attack.intervals import Paired, percent
from reverse_attack.reversal import BUDGETS, REVERSAL_FACTOR, Reversal, noise
from utils import UserError

Repair = Callable[[Tensor, int], Tensor]  # (pixels, seed) -> pixels
# By row: which answers are right (N,), the loss of each image (N,), seconds an image
Rows = dict[str, tuple[Tensor, Tensor, float]]


def parse(argv: list[str] | None) -> Namespace:
    parser = options.parser("Accuracy on clean or attacked images, reversed or not.", 125)
    add = parser.add_argument
    add("--task", choices=("default", "SSL", "random"), default="default")
    add("--norm", choices=("clean", *NORMS), default="clean")
    add("--iter", type=at_least(int, 0), help="the attack set made with so many iterations")
    add("--savepath", type=Path, metavar="FOLDER", help="attack.py's; else the data root")
    add("--transfer", action="store_true", help="accept a set made for another checkpoint")
    add("--head", metavar="FILE", help="instead of the newest head of this classifier")
    add("--attack_iter", type=at_least(int, 0), default=40, help="steps of the reversal")
    add("--epsilon", type=at_least(float, 0), help="its budget, unit as for the attack")
    add("--alpha", type=at_least(float, 0), help="its step, likewise; epsilon / 8")
    add("--n_views", type=at_least(int, 2), default=4)
    add("--negatives", choices=("batch", "bank"), default="batch", help="other images or fixed")
    return parser.parse_args(argv)


def make_repair(args: Namespace, trained: LoadedClassifier) -> Repair | None:
    """What happens to the images before the classifier sees them; None = nothing."""
    norm = "linf" if args.norm == "clean" else NORMS[args.norm]
    radius = REVERSAL_FACTOR * BUDGETS[norm] if args.epsilon is None else args.epsilon
    if args.task == "default":
        return None
    if args.task == "random":
        return lambda x, seed: noise(x, norm, radius, seed)
    loss = heads.from_args(args, trained).loss(trained, args.n_views, args.negatives)
    return Reversal(loss, norm, radius, args.alpha, args.attack_iter)


def infer(args: Namespace) -> None:
    device = options.choose_device(args.device)
    listing = data.list_images(args.dataset, args.data_root, "test")
    trained = classifier.from_args(args, len(listing.classes), device)
    repair = make_repair(args, trained)
    if args.norm == "clean":
        images = listing.sample(args.seed, args.limit)
        x, y = data.as_pixels(images.x), images.y
    else:
        folder = args.savepath or args.data_root
        found = attack_sets.load(folder, args.norm, args.iter, trained.sha256, args.transfer)
        x, y = found.x[: args.limit], found.y[: args.limit]
        if x.shape[1] != 3 or not 0 <= y.min() <= y.max() < len(listing.classes):
            raise UserError(f"the attack set in {folder} is of other images than {args.dataset}'s")
    rows = measure(trained.model, x, y, repair, args, device)
    report(args, trained, rows)


def measure(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    repair: Repair | None,
    args: Namespace,
    device: torch.device,
) -> Rows:
    """Without the repair, and with it if there is one; the classifier never sees a label."""
    repairs = {args.norm: None} | ({f"{args.norm} + {args.task}": repair} if repair else {})
    rows = {}
    for name, change in repairs.items():
        start, right, losses = time.perf_counter(), [], []
        for i in range(0, len(x), args.batchsize):
            batch, labels = x[i : i + args.batchsize].to(device), y[i : i + args.batchsize]
            if change is not None:
                batch = change(batch, args.seed + i)
            with torch.no_grad():
                logits = model(batch).cpu()
            right.append(logits.argmax(1) == labels)
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
        seconds = (time.perf_counter() - start) / len(x)
        rows[name] = (torch.cat(right), torch.cat(losses), seconds)
    return rows


def report(args: Namespace, trained: LoadedClassifier, rows: Rows) -> None:
    """Print the rows and add them to the evaluations of the classifier's run."""
    folder = run_logger.run_dir_of(trained.path) or run_logger.new_run("inference")
    print(f"{'Perturbation':<18} | Accuracy (%)      | Test loss")
    for name, (right, losses, seconds) in rows.items():
        n, hits = len(right), right.sum().item()
        print(f"{name:<18} | {percent(hits, n):<17} | {losses.mean():.4f}")
        options_used = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
        run_logger.add_evaluation(
            folder,
            perturbation=name,
            accuracy=100 * hits / n,
            test_loss=losses.mean().item(),
            n=n,
            seconds_per_image=seconds,
            options=options_used,
        )
    if len(rows) == 2:
        (before, _, _), (after, _, seconds) = rows.values()
        paired = Paired.of(before, after)
        print(
            f"Gain {paired.gain:+.1f} points on n = {paired.n}: {paired.fixed} fixed, "
            f"{paired.broken} broken, McNemar p = {paired.p:.3g}; {seconds:.2f} s an image"
        )


def main(argv: list[str] | None = None) -> int:
    return options.run(infer, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
