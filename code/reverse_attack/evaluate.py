"""What the reversal is worth against attacks that know of it. From code/:

python reverse_attack/evaluate.py --protocol quick    # half an hour on two cores, narrow network
python reverse_attack/evaluate.py --protocol full     # for a GPU
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from pathlib import Path

if __name__ == "__main__":  # as a script: modules are found from code/, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from deepvision.config import at_least
from reverse_attack import classifier, data, heads, options, verdict
from reverse_attack.protocol import PROTOCOLS, Evaluation
from reverse_attack.reversal import BUDGETS

RESULTS = Path(__file__).resolve().parents[2] / "results"


def parse(argv: list[str] | None) -> Namespace:
    parser = options.parser("Evaluate the reversal, adaptively.", 125)
    add = parser.add_argument
    add("--protocol", choices=PROTOCOLS, default="quick")
    add(
        "--adaptive_limit", type=at_least(int, 1), metavar="N", help="of these for adaptive attacks"
    )
    add("--epsilon", type=at_least(float, 0), default=BUDGETS["linf"], help="attacks', in /255")
    add("--head", metavar="FILE", help="instead of the newest head of this classifier")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="for .json and .md")
    return parser.parse_args(argv)


def evaluate(args: Namespace) -> None:
    options.writable(args.results)
    device = options.choose_device(args.device)
    listing = data.list_images(args.dataset, args.data_root, "test")
    trained = classifier.from_args(args, len(listing.classes), device)
    head = heads.from_args(args, trained)
    size = PROTOCOLS[args.protocol]
    images = listing.sample(args.seed, args.limit or size.n)
    few = min(args.adaptive_limit or size.n_adaptive, len(images))
    size = dataclasses.replace(size, n=len(images), n_adaptive=few)
    evaluation = Evaluation(
        model=trained.model,
        contrastive=head.loss(trained, 2),
        untrained=heads.untrained(trained, head, args.seed).loss(trained, 2),
        x=data.as_pixels(images.x).to(device),
        y=images.y.to(device),
        size=size,
        epsilon=args.epsilon,
        batchsize=args.batchsize,
        seed=args.seed,
    )
    about = options.provenance(args, device) | {
        "protocol": args.protocol,
        "size": dataclasses.asdict(size),
        "epsilon_255": args.epsilon,
        "classifier": {"arch": trained.arch, "sha256": trained.sha256},
        "head": {k: head.content[k] for k in ("loss", "n_views", "held_out_loss", "chance")},
    }
    verdict.write(args.results / f"reverse_{args.protocol}", about, *evaluation.run())


def main(argv: list[str] | None = None) -> int:
    return options.run(evaluate, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
