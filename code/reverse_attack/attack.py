"""Attack the test images of a classifier and keep the results. From code/:

python reverse_attack/attack.py --attack_iters 5 --norm l_1        # also l_2, l_inf, all
python reverse_attack/attack.py --norm l_inf --attack_type cw --restarts 3 --eval
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path

import torch

if __name__ == "__main__":  # as a script: modules are found from code/, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from deepvision.attacks.norms import size
from deepvision.attacks.pgd import PGD
from deepvision.config import at_least
from reverse_attack import attack_sets, classifier, data, options
from reverse_attack.attack_sets import NORMS, AttackSet
from reverse_attack.classifier import LoadedClassifier
from reverse_attack.reversal import BUDGETS, pixels_of

LOSSES = {"pgd": "ce", "cw": "margin", "dlr": "dlr"}


def parse(argv: list[str] | None) -> Namespace:
    parser = options.parser("Attack a classifier's test images in an l_p ball.", 250)
    add = parser.add_argument
    add("--norm", choices=(*NORMS, "all"), default="l_inf")
    add("--attack_iters", type=at_least(int, 0), default=5)
    add("--epsilon", type=at_least(float, 0), help="in /255 for l_inf, else on [0, 1] images")
    add("--pgd-alpha", type=at_least(float, 0), help="step, likewise; 2.5 epsilon / iterations")
    add("--attack_type", choices=LOSSES, default="pgd", help="cross-entropy, margin, DLR")
    add("--restarts", type=at_least(int, 1), default=1, help="the worst run counts, by image")
    add("--eval", action="store_true", help="stop at each image's first success")
    add("--savepath", type=Path, metavar="FOLDER", help="instead of the data root")
    args = parser.parse_args(argv)
    if args.norm == "all" and (args.epsilon, args.pgd_alpha) != (None, None):
        parser.error("--epsilon and --pgd-alpha mean another length in each norm: name one norm")
    return args


def attack(args: Namespace) -> None:
    device = options.choose_device(args.device)
    listing = data.list_images(args.dataset, args.data_root, "test")
    trained = classifier.from_args(args, len(listing.classes), device)
    images = listing.sample(args.seed, args.limit)
    norms = NORMS if args.norm == "all" else (args.norm,)
    for norm in norms:
        options.writable((args.savepath or args.data_root) / "pgd" / norm)
    for norm in norms:
        made = attack_all(args, norm, trained, images, device)
        to = attack_sets.save(made, args.savepath or args.data_root, norm, args.attack_iters)
        print(
            f"{norm}: clean {made.meta['clean_accuracy']:.2f} %, attacked "
            f"{made.meta['attacked_accuracy']:.2f} %, largest norm {made.meta['largest_norm']:.4g} "
            f"of {made.meta['epsilon']:g}; {to}"
        )


def make(args: Namespace, norm: str) -> PGD:
    """The attack that the command line asks for; warns of a step that cannot reach epsilon."""
    epsilon = BUDGETS[NORMS[norm]] if args.epsilon is None else args.epsilon
    pgd = PGD(
        norm=NORMS[norm],
        epsilon=epsilon,
        steps=args.attack_iters,
        step_size=0.0 if args.attack_iters == 0 else args.pgd_alpha,
        loss=LOSSES[args.attack_type],
        random_start=True,
        restarts=args.restarts,
        early_stop=args.eval,
        pixels=pixels_of(NORMS[norm]),
        generator=torch.Generator().manual_seed(args.seed),
    )
    if pgd.base_step() * pgd.steps < epsilon:
        print(
            f"warning: {pgd.steps} steps of {pgd.base_step():g} cannot reach epsilon {epsilon:g}",
            file=sys.stderr,
        )
    return pgd


def attack_all(
    args: Namespace, norm: str, trained: LoadedClassifier, images: data.Images, device: torch.device
) -> AttackSet:
    """Every image attacked, and what the attack was and did."""
    pgd, model, start = make(args, norm), trained.model, time.perf_counter()
    attacked, largest, clean_hits, hits = [], 0.0, 0, 0
    for x, y in images.batches(args.batchsize):
        x, y = x.to(device), y.to(device)
        x_adv = pgd.perturb(model, x, y).clamp(0, 1)
        delta = (x_adv - x) * pgd.pixels.scale(x)
        largest = max(largest, size(delta, pgd.norm).max().item())
        with torch.no_grad():
            clean_hits += (model(x).argmax(1) == y).sum().item()
            hits += (model(x_adv).argmax(1) == y).sum().item()
        attacked.append(x_adv.cpu())
    measured = {
        "images": len(images),
        "clean_accuracy": 100 * clean_hits / len(images),
        "attacked_accuracy": 100 * hits / len(images),
        "largest_norm": largest,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return AttackSet(torch.cat(attacked), images.y, describe(pgd, args, norm, trained) | measured)


def describe(pgd: PGD, args: Namespace, norm: str, trained: LoadedClassifier) -> dict:
    """How the images were made, and of which classifier."""
    return {
        "norm": norm,
        "epsilon": pgd.epsilon,
        "epsilon_unit": "1/255" if norm == "l_inf" else "pixels in [0, 1]",
        "step_size": pgd.base_step(),
        "iterations": pgd.steps,
        "restarts": pgd.restarts,
        "loss": pgd.loss,
        "early_stop": pgd.early_stop,
        "seed": args.seed,
        "dataset": args.dataset,
        "checkpoint": f"{trained.path.parent.parent.name}/{trained.path.name}",
        "checkpoint_sha256": trained.sha256,
        "bf16": args.bf16,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }


def main(argv: list[str] | None = None) -> int:
    return options.run(attack, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
