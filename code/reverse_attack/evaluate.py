"""Evaluate the reversal against attacks that know it. From code/:

python reverse_attack/evaluate.py --protocol quick    # half an hour on two cores, narrow network
python reverse_attack/evaluate.py --protocol full     # for a GPU
"""

from __future__ import annotations

import signal

INTERRUPT = signal.getsignal(signal.SIGINT)
if __name__ == "__main__":  # Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a script: modules are found from code/, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from deepvision.config import at_least
from deepvision.runtime.console import script
from deepvision.runtime.provenance import ROOT
from deepvision.runtime.run_dir import LOGS
from reverse_attack import classifier, data, heads, options, results_report
from reverse_attack.protocol import PROTOCOLS, Evaluator
from reverse_attack.reversal import BUDGETS, REVERSAL_FACTOR
from utils import UserError

RESULTS = ROOT / "results"
HEAD_RECORD = ("loss", "n_views", "held_out_loss", "chance", "min_crop")


def parse(argv: Sequence[str]) -> Namespace:
    """Read the command line."""
    parser = options.make_parser(__doc__, 125)
    add = parser.add_argument
    add("--protocol", choices=PROTOCOLS, default="quick", help="how many images and steps")
    add("--adaptive-limit", type=at_least(int, 1), metavar="N", help="images of adaptive attacks")
    add("--epsilon", type=at_least(float, 0), default=BUDGETS["linf"], help="of the attacks, /255")
    options.add_reversal_flags(parser, negatives="bank")
    options.add_view_flags(parser, n_views=None)  # the protocol sets their number
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="for .json and .md")
    return options.parse(parser, argv, "evaluate.py")


def evaluate(args: Namespace) -> None:
    """Run the protocol; write its tables to reverse_<protocol>.json and .md."""
    options.check_epsilon(args.epsilon, "linf", args.dataset)
    if REVERSAL_FACTOR * args.epsilon > 255:
        twice = REVERSAL_FACTOR * args.epsilon
        raise UserError(f"--epsilon {args.epsilon:g}: the reversal's is {twice:g}, more than 255")
    options.require_writable(args.results)
    index = data.list_images(args.dataset, args.data_root, "test")
    loaded = classifier.from_args(args, len(index.classes))
    head = heads.from_args(args, loaded)
    budget = PROTOCOLS[args.protocol]
    images = index.sample(args.seed, args.limit or budget.n)
    n_adaptive = min(args.adaptive_limit or budget.n_adaptive, len(images))
    budget = dataclasses.replace(budget, n=len(images), n_adaptive=n_adaptive)
    untrained = heads.untrained(loaded, head, args.seed)
    view_choices = {"negatives": args.negatives, "min_crop": args.min_crop}
    evaluator = Evaluator(
        model=loaded.model,
        contrastive=head.contrastive_loss(loaded, 2, **view_choices),
        untrained=untrained.contrastive_loss(loaded, 2, **view_choices),
        x=data.as_pixels(images.x).to(args.device),
        y=images.y.to(args.device),
        budget=budget,
        epsilon=args.epsilon,
        batch_size=args.batch_size,
        seed=args.seed,
        random_start=args.random_start,
    )
    record = options.record(args) | {
        "protocol": args.protocol,
        "budget": dataclasses.asdict(budget),
        "epsilon_255": args.epsilon,
        "classifier": {"arch": loaded.arch, "sha256": loaded.sha256},
        "head": {k: head.ckpt.get(k) for k in HEAD_RECORD},
        "min_crop": evaluator.contrastive.min_crop,
    }
    results_report.write(args.results / f"reverse_{args.protocol}", record, *evaluator.run())


def main(argv: Sequence[str] | None = None, logs: Path = LOGS) -> int:
    """Run one command line; return the exit code. logs: where run folders are."""
    return options.run(evaluate, parse(sys.argv[1:] if argv is None else argv), logs)


if __name__ == "__main__":
    with script(INTERRUPT):
        sys.exit(main())
