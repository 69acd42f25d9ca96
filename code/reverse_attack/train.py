"""Train a classifier, plain or robust, or the self-supervised head. From code/:

python reverse_attack/train.py --task Clean
python reverse_attack/train.py --task Robust --at fgsm-rs
python reverse_attack/train.py --task SSL --loss Cosine --n_views 4 --batchsize 512
"""

from __future__ import annotations

import sys
from argparse import Namespace

import _path  # noqa: F401
import options
from arguments import at_least
from classifier_training import ATTACKS, train_classifier

DEFAULTS = {  # of a task, where the command line says nothing
    "Clean": {"batchsize": 128, "epochs": 8, "lr": 0.2, "optim": "SGD"},
    "Robust": {"batchsize": 128, "epochs": 8, "lr": 0.2, "optim": "SGD"},
}


def parse(argv: list[str] | None) -> Namespace:
    parser = options.parser("Train a classifier or the self-supervised head.", None)
    add = parser.add_argument
    add("--task", choices=DEFAULTS, required=True)
    add("--epochs", type=at_least(int, 1))
    add("--lr", type=at_least(float, 0))
    add("--optim", choices=("Adam", "SGD"))
    add("--at", choices=ATTACKS, default="fgsm-rs", help="adversarial training of Robust")
    add("--epsilon", type=at_least(float, 0, 255), default=8.0, help="its l_inf budget, in /255")
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: list[str] | None = None) -> int:
    return options.run(train_classifier, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
