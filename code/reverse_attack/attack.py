"""Attack the test images of a classifier and store the results. From code/:

python reverse_attack/attack.py --attack-iters 5 --norm l_1        # also l_2, l_inf, all
python reverse_attack/attack.py --norm l_inf --attack-type cw --restarts 3 --eval
python reverse_attack/attack.py --norm all --attack-suite standard --limit 1000
"""

from __future__ import annotations

import signal

INTERRUPT = signal.getsignal(signal.SIGINT)
if __name__ == "__main__":  # Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a script: modules are found from code/, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from deepvision.attacks import PGD, AutoAttack, lp_norm
from deepvision.attacks.autoattack import VERSIONS
from deepvision.config import at_least
from deepvision.evaluation.robust_eval import attack_errors, evaluate_robustness
from deepvision.runtime.console import script
from deepvision.runtime.run_dir import LOGS
from reverse_attack import attack_sets, classifier, options
from reverse_attack.attack_sets import ATTACKS, NORMS, AttackSet
from reverse_attack.classifier import LoadedClassifier
from reverse_attack.cost import measure_cost
from reverse_attack.data import Images, as_pixels, list_images
from reverse_attack.reversal import input_scale
from utils import relpath

# Flags of a single attack and their defaults
SINGLE = {"attack_iters": 5, "pgd_alpha": None, "attack_type": "pgd", "restarts": 1, "eval": False}


def parse(argv: Sequence[str]) -> Namespace:
    """Read the command line."""
    parser = options.make_parser(__doc__, 250)
    add = parser.add_argument
    add("--norm", type=options.norm("all"), default="linf", help="l_inf, l_2, l_1 or all")
    add("--attack-iters", type=at_least(int, 0), help="steps; default 5")
    add("--epsilon", type=at_least(float, 0), help="in /255 for l_inf, else on [0, 1] images")
    add("--pgd-alpha", type=at_least(float, 0), help="step size, likewise; 2.5 epsilon / steps")
    add(
        "--attack-type",
        choices=ATTACKS,
        help="by its loss: cross-entropy, margin or DLR; default pgd",
    )
    add("--restarts", type=at_least(int, 1), help="the worst run counts for each image; default 1")
    add("--eval", action="store_true", default=None, help="stop at each image's first success")
    add("--attack-suite", choices=VERSIONS, help="AutoAttack's set: accuracy only, resumable")
    add("--savepath", type=Path, metavar="FOLDER", help="default: the data root")
    args = options.parse(parser, argv, "attack.py")
    if args.norm == "all" and (args.epsilon, args.pgd_alpha) != (None, None):
        parser.error("--epsilon and --pgd-alpha have another unit in each norm: name one norm")
    given = {name for name in SINGLE if getattr(args, name) is not None}
    if args.attack_suite and given:
        flag = min(given).replace("_", "-")
        parser.error(f"--attack-suite sets its attacks: leave --{flag} out")
    vars(args).update({k: v for k, v in SINGLE.items() if k not in given})
    return args


def attack(args: Namespace) -> None:
    """Attack the images in each norm."""
    options.check_epsilon(args.epsilon, args.norm, args.dataset)
    index = list_images(args.dataset, args.data_root, "test")
    loaded = classifier.from_args(args, len(index.classes))
    images = index.sample(args.seed, args.limit)
    root = args.savepath or args.data_root
    norms = NORMS if args.norm == "all" else (args.norm,)
    for norm in norms:
        options.require_writable(attack_sets.folder_of(root, norm))
    with attack_errors():
        for norm in norms:
            run = run_suite if args.attack_suite else run_attack
            run(args, norm, loaded, images, root)


def run_attack(
    args: Namespace, norm: str, loaded: LoadedClassifier, images: Images, root: Path
) -> None:
    """Attack the images in one norm and store the set below `root`."""
    attacked = attack_all(args, norm, loaded, images)
    path, meta = attack_sets.save(attacked, root, norm), attacked.meta
    print(
        f"{NORMS[norm]}: clean {meta['clean_accuracy']:.2f} %, attacked "
        f"{meta['attacked_accuracy']:.2f} %, largest norm {meta['largest_norm']:.4g} "
        f"of {meta['epsilon']:g}; per image {meta['forward_passes_per_image']:.1f} forward "
        f"passes, {meta['seconds_per_image']:.3f} s; {relpath(path)}"
    )


def run_suite(
    args: Namespace, norm: str, loaded: LoadedClassifier, images: Images, root: Path
) -> None:
    """Robust accuracy under AutoAttack's set; a stopped evaluation continues."""
    suite = AutoAttack(
        norm=norm,
        epsilon=epsilon_of(args, norm),
        version=args.attack_suite,
        pixels=input_scale(norm),
        batch_size=args.batch_size,
        seed=args.seed,
    )
    name = f"autoattack_{suite.version}_eps{suite.epsilon:g}_{len(images)}_{loaded.sha256[:8]}.json"
    path = attack_sets.folder_of(root, norm) / name
    print(f"Results image by image, from which a stopped evaluation continues: {relpath(path)}")
    x, y = as_pixels(images.x).to(args.device), images.y.to(args.device)
    result = evaluate_robustness(loaded.model, x, y, suite, path)
    print(result.format_table(), result.summary(), sep="\n")


def epsilon_of(args: Namespace, norm: str) -> float:
    """The radius of the attack, in the unit of `input_scale(norm)`."""
    return args.budgets[norm] if args.epsilon is None else args.epsilon


def make_attack(args: Namespace, norm: str) -> PGD:
    """The attack of the command line; warns of a step that cannot reach epsilon."""
    epsilon = epsilon_of(args, norm)
    pgd = PGD(
        norm=norm,
        epsilon=epsilon,
        steps=args.attack_iters,
        step_size=0.0 if args.attack_iters == 0 else args.pgd_alpha,
        loss=ATTACKS[args.attack_type],
        random_start=True,
        restarts=args.restarts,
        early_stop=args.eval,
        pixels=input_scale(norm),
        generator=torch.Generator().manual_seed(args.seed),
    )
    if pgd.base_step() * pgd.steps < epsilon:
        print(
            f"warning: {pgd.steps} steps of {pgd.base_step():g} cannot reach epsilon {epsilon:g}",
            file=sys.stderr,
        )
    return pgd


def attack_all(args: Namespace, norm: str, loaded: LoadedClassifier, images: Images) -> AttackSet:
    """Attack every image; the record says with what, and with what success and cost."""
    pgd, model = make_attack(args, norm), loaded.model
    attacked, largest, clean_hits, hits = [], 0.0, 0, 0
    forward = seconds = 0.0
    for x, y in images.batches(args.batch_size):
        x, y = x.to(args.device), y.to(args.device)
        with measure_cost(model, len(images)) as cost:
            x_adv = pgd.perturb(model, x, y).clamp(0, 1)
        forward, seconds = forward + cost.forward, seconds + cost.seconds
        delta = (x_adv - x) * pgd.pixels.scale(x)
        largest = max(largest, lp_norm(delta, pgd.norm).max().item())
        with torch.no_grad():
            clean_hits += (model(x).argmax(1) == y).sum().item()
            hits += (model(x_adv).argmax(1) == y).sum().item()
        attacked.append(x_adv.cpu())
    measured = {
        "images": len(images),
        "clean_accuracy": 100 * clean_hits / len(images),
        "attacked_accuracy": 100 * hits / len(images),
        "largest_norm": largest,
        "forward_passes_per_image": forward,
        "seconds_per_image": seconds,
    }
    return AttackSet(torch.cat(attacked), images.y, describe(pgd, args, norm, loaded) | measured)


def describe(pgd: PGD, args: Namespace, norm: str, loaded: LoadedClassifier) -> dict:
    """The record of the attack and of the classifier that it attacks."""
    return {
        "attack": args.attack_type,
        "norm": NORMS[norm],
        "epsilon": pgd.epsilon,
        "epsilon_unit": "1/255" if norm == "linf" else "images in [0, 1]",
        "step_size": pgd.base_step(),
        "iterations": pgd.steps,
        "restarts": pgd.restarts,
        "loss": pgd.loss,
        "early_stop": pgd.early_stop,
        "seed": args.seed,
        "dataset": args.dataset,
        "checkpoint": f"{loaded.path.parent.parent.name}/{loaded.path.name}",
        "checkpoint_sha256": loaded.sha256,
        "bf16": args.bf16,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }


def main(argv: Sequence[str] | None = None, logs: Path = LOGS) -> int:
    """Run one command line; return the exit code. logs: where run folders are."""
    return options.run(attack, parse(sys.argv[1:] if argv is None else argv), logs)


if __name__ == "__main__":
    with script(INTERRUPT):
        sys.exit(main())
