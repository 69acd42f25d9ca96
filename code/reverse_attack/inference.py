"""Accuracy on clean or attacked images, without and with their reversal. From code/:

python reverse_attack/inference.py --norm clean                    # also l_1, l_2, l_inf
python reverse_attack/inference.py --task SSL --norm l_inf         # reversed first
python reverse_attack/inference.py --task random --norm l_inf      # noise of the same radius first
"""

from __future__ import annotations

import signal

INTERRUPT = signal.getsignal(signal.SIGINT)
if __name__ == "__main__":  # Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # as a script: modules are found from code/, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor

from deepvision.config import at_least
from deepvision.evaluation.robust_eval import attack_errors
from deepvision.evaluation.statistics import Paired, percent
from deepvision.runtime.console import script
from deepvision.runtime.run_dir import LOGS, append_evaluation, new_run_dir, run_dir_of
from reverse_attack import attack_sets, classifier, data, heads, options
from reverse_attack.attack_sets import NORMS
from reverse_attack.classifier import Classifier, LoadedClassifier
from reverse_attack.cost import Cost, measure_cost
from reverse_attack.reversal import REVERSAL_FACTOR, Reversal, add_noise
from utils import UserError

Defence = Callable[[Tensor, int], Tensor]  # (images, seed) -> images


@dataclass
class Row:
    """Which predictions are correct (N,), the loss of each image (N,), and the cost per image."""

    correct: Tensor
    losses: Tensor
    cost: Cost


def parse(argv: Sequence[str]) -> Namespace:
    """Read the command line."""
    parser = options.make_parser(__doc__, 125)
    add = parser.add_argument
    add(
        "--task",
        choices=("default", "SSL", "random"),
        default="default",
        help="before classification: nothing, the reversal, or noise; default nothing",
    )
    add("--norm", type=options.norm("clean"), default="clean", help="clean, l_inf, l_2 or l_1")
    add("--iter", type=at_least(int, 0), metavar="N", help="the attack set made with N steps")
    add("--set", metavar="NAME", help="the attack set whose name contains NAME")
    add("--savepath", type=Path, metavar="FOLDER", help="as for attack.py; default: the data root")
    add("--transfer", action="store_true", help="accept a set made for another checkpoint")
    add("--attack-iter", type=at_least(int, 0), default=40, help="steps of the reversal")
    add("--epsilon", type=at_least(float, 0), help="its radius, unit as for the attack; default 2x")
    add("--alpha", type=at_least(float, 0), help="its step size, likewise; epsilon / 8")
    options.add_reversal_flags(parser, negatives="batch")
    options.add_view_flags(parser)
    return options.parse(parser, argv, "inference.py")


def reversal_norm(args: Namespace) -> str:
    """The norm of the reversal: that of the attack, l_inf for clean images."""
    return "linf" if args.norm == "clean" else args.norm


def make_defence(args: Namespace, loaded: LoadedClassifier) -> Defence | None:
    """The change of the images before they are classified; None = none."""
    norm = reversal_norm(args)
    radius = REVERSAL_FACTOR * args.budgets[norm] if args.epsilon is None else args.epsilon
    if args.task == "default":
        return None
    if args.task == "random":
        return lambda x, seed: add_noise(x, norm, radius, seed)
    head = heads.from_args(args, loaded)
    loss = head.contrastive_loss(loaded, args.n_views, args.negatives, args.min_crop)
    return Reversal(loss, norm, radius, args.alpha, args.attack_iter, args.random_start)


def infer(args: Namespace) -> None:
    """Evaluate the images of the command line; print and record the rows."""
    options.check_epsilon(args.epsilon, reversal_norm(args), args.dataset)
    index = data.list_images(args.dataset, args.data_root, "test")
    loaded = classifier.from_args(args, len(index.classes))
    if args.norm == "clean":
        images, source = index.sample(args.seed, args.limit), {}
        x, y = data.as_pixels(images.x), images.y
    else:
        x, y, source = load_set(args, loaded, len(index.classes))
    defence = make_defence(args, loaded)
    with attack_errors():  # a radius larger than the box
        rows = measure(loaded.model, x, y, defence, args)
    report(args, loaded, rows, source)


def load_set(
    args: Namespace, loaded: LoadedClassifier, num_classes: int
) -> tuple[Tensor, Tensor, dict]:
    """Images and labels of the attack set of the command line, and what identifies it.

    Raises:
        UserError: no set fits, several do, or it has other images or classes.
    """
    root = args.savepath or args.data_root
    name, meta = attack_sets.select(
        root, args.norm, args.iter, args.set, loaded.sha256, args.transfer
    )
    print(f"Attack set: {name} ({attack_sets.describe(meta)})", flush=True)
    found = attack_sets.load(root, args.norm, name, meta)
    x, y = found.x[: args.limit], found.y[: args.limit]
    if x.shape[1] != 3 or not 0 <= y.min() <= y.max() < num_classes:
        raise UserError(f"the attack set {name} holds other images than {args.dataset}'s")
    return x, y, {"attack_set": name}


def measure(
    model: Classifier, x: Tensor, y: Tensor, defence: Defence | None, args: Namespace
) -> dict[str, Row]:
    """The rows without the defence and, if there is one, with it.

    x: (N, 3, H, W) in [0, 1]; the labels y (N,) reach neither the defence nor the classifier.
    """
    name = NORMS.get(args.norm, args.norm)
    rows = {name: classify(model, x, y, None, args)}
    if defence:
        rows[f"{name} + {args.task}"] = classify(model, x, y, defence, args)
    return rows


def classify(
    model: Classifier, x: Tensor, y: Tensor, defence: Defence | None, args: Namespace
) -> Row:
    """Classify the images, changed by the defence first if there is one."""
    correct, losses = [], []
    with measure_cost(model, len(x)) as cost:
        for i in range(0, len(x), args.batch_size):
            batch, labels = (v[i : i + args.batch_size] for v in (x, y))
            batch = batch.to(args.device)
            if defence is not None:
                batch = defence(batch, args.seed + i)
            with torch.no_grad():
                logits = model(batch).cpu()
            correct.append(logits.argmax(1) == labels)
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
    return Row(torch.cat(correct), torch.cat(losses), cost)


def report(args: Namespace, loaded: LoadedClassifier, rows: dict[str, Row], source: dict) -> None:
    """Print the rows, and append them to the evaluations of the classifier's run."""
    run_dir = run_dir_of(loaded.path, args.logs) or new_run_dir(args.logs, "inference")
    print(f"{'Perturbation':<18} | Accuracy (%)      | Test loss | Forward passes, s per image")
    arguments = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
    for name, row in rows.items():
        n, hits, loss = len(row.correct), row.correct.sum().item(), row.losses.mean().item()
        cost = f"{row.cost.forward:.0f}, {row.cost.seconds:.3f}"
        print(f"{name:<18} | {percent(hits, n):<17} | {loss:<9.4f} | {cost}")
        evaluation = {
            "perturbation": name,
            "accuracy": 100 * hits / n,
            "test_loss": loss,
            "n": n,
            "seconds_per_image": row.cost.seconds,
            "forward_passes_per_image": row.cost.forward,
            "options": arguments,
        }
        append_evaluation(run_dir, evaluation | source)
    if len(rows) == 2:
        before, after = rows.values()
        paired = Paired.of(before.correct, after.correct)
        print(
            f"Gain {paired.gain:+.1f} points on n = {paired.n}: {paired.fixed} fixed, "
            f"{paired.broken} broken, McNemar p = {paired.p:.3g}"
        )


def main(argv: Sequence[str] | None = None, logs: Path = LOGS) -> int:
    """Run one command line; return the exit code. logs: where run folders are."""
    return options.run(infer, parse(sys.argv[1:] if argv is None else argv), logs)


if __name__ == "__main__":
    with script(INTERRUPT):
        sys.exit(main())
