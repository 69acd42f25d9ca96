"""What the reversal is worth against attacks that know of it. From code/:

python reverse_attack/evaluate.py --protocol quick    # half an hour on two cores, narrow network
python reverse_attack/evaluate.py --protocol full     # for a GPU
"""

from __future__ import annotations

import dataclasses
import os
import sys
from argparse import Namespace
from pathlib import Path

import torch

import _path  # noqa: F401
import classifier
import data
import head_training
import options
import verdict
from arguments import at_least
from contrastive import ContrastiveLoss, Head
from protocol import PROTOCOLS, Evaluation
from reversal import BUDGETS

RESULTS = Path(__file__).resolve().parents[2] / "results"


def parse(argv: list[str] | None) -> Namespace:
    parser = options.parser("Evaluate the reversal, adaptively.", 125)
    add = parser.add_argument
    add("--protocol", choices=PROTOCOLS, default="quick")
    add("--epsilon", type=at_least(float, 0), default=BUDGETS["linf"], help="attacks', in /255")
    add("--head", metavar="FILE", help="instead of the newest head of this classifier")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="for .json and .md")
    return parser.parse_args(argv)


def evaluate(args: Namespace) -> None:
    device = options.choose_device(args.device)
    size = PROTOCOLS[args.protocol]
    if args.limit:
        fewer = min(args.limit, size.n_adaptive)
        size = dataclasses.replace(size, n=min(args.limit, size.n), n_adaptive=fewer)
    path = classifier.find(args.weights, args.dataset, args.arch)
    images = data.test_images(args.dataset, args.data_root, args.seed, size.n)
    size = dataclasses.replace(size, n=len(images), n_adaptive=min(len(images), size.n_adaptive))
    trained = classifier.load(path, args.arch, len(images.classes), args.bf16)
    head_path, content = head_training.find_head(args.head, trained, args.dataset)
    head, bank = head_training.load_head(trained, head_path, content)
    print(f"Classifier: {os.path.relpath(path)}\nHead: {os.path.relpath(head_path)}", flush=True)

    def loss_of(head: Head) -> ContrastiveLoss:
        return ContrastiveLoss(trained.model, head, content["loss"], 2, bank).to(device).eval()

    torch.manual_seed(args.seed)
    evaluation = Evaluation(
        model=trained.model,
        contrastive=loss_of(head),
        untrained=loss_of(Head(trained.model.last.in_features)),
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
        "head": {k: content[k] for k in ("loss", "n_views", "held_out_loss", "chance")},
    }
    verdict.write(args.results / f"reverse_{args.protocol}", about, *evaluation.run())


def main(argv: list[str] | None = None) -> int:
    return options.run(evaluate, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
