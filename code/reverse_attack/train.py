"""Train a classifier, plain or robust, or the self-supervised head. From code/:

python reverse_attack/train.py --task Clean
python reverse_attack/train.py --task Robust --at fgsm-rs
python reverse_attack/train.py --task SSL --loss Cosine --n_views 4 --batchsize 512
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

if __name__ == "__main__":  # as a script: modules are found from code/, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from deepvision.config import at_least
from deepvision.training.objectives import STEPS
from reverse_attack import options
from reverse_attack.classifier_training import train_classifier
from reverse_attack.contrastive import SIMILARITIES
from reverse_attack.head_training import train_head

DEFAULTS = {  # of a task, where the command line says nothing
    "Clean": {"batchsize": 128, "epochs": 8, "lr": 0.2, "optim": "SGD"},
    "Robust": {"batchsize": 128, "epochs": 8, "lr": 0.2, "optim": "SGD"},
    "SSL": {"batchsize": 512, "epochs": 60, "lr": 1e-4, "optim": "Adam"},
}


def parse(argv: list[str] | None) -> Namespace:
    parser = options.parser("Train a classifier or the self-supervised head.", None)
    add = parser.add_argument
    add("--task", choices=DEFAULTS, required=True)
    add("--epochs", type=at_least(int, 1))
    add("--lr", type=at_least(float, 0))
    add("--optim", choices=("Adam", "SGD"))
    add("--at", choices=STEPS, default="fgsm-rs", help="adversarial training of Robust")
    add("--epsilon", type=at_least(float, 0, 255), default=8.0, help="its l_inf budget, in /255")
    add("--loss", choices=SIMILARITIES, default="Cosine", help="similarity of views, SSL")
    add("--n_views", type=at_least(int, 2), default=4, help="of each image, SSL")
    add(
        "--cached_views",
        type=at_least(int, 0),
        default=0,
        metavar="K",
        help="make K views of each image once and keep their features; 0 = anew at each step",
    )
    args = parser.parse_args(argv)
    if 0 < args.cached_views < args.n_views:
        parser.error(f"--cached_views {args.cached_views} is fewer than --n_views {args.n_views}")
    for name, value in DEFAULTS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return options.run(train_head if args.task == "SSL" else train_classifier, args)


if __name__ == "__main__":
    sys.exit(main())
