"""Train a classifier, standard or robust, or the self-supervised head. From code/:

python reverse_attack/train.py --task Clean
python reverse_attack/train.py --task Robust --at fgsm-rs
python reverse_attack/train.py --task SSL --loss Cosine --n-views 4 --batch-size 512
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

from deepvision.config import at_least
from deepvision.runtime.console import script
from deepvision.runtime.run_dir import LOGS
from deepvision.training.objectives import STEPS
from reverse_attack import options
from reverse_attack.classifier_training import train_classifier
from reverse_attack.contrastive import SIMILARITIES
from reverse_attack.head_training import train_head
from reverse_attack.views import MIN_CROP

TASK_DEFAULTS = {
    "Clean": {"batch_size": 128, "epochs": 8, "lr": 0.2, "optim": "SGD"},
    "Robust": {"batch_size": 128, "epochs": 8, "lr": 0.2, "optim": "SGD"},
    "SSL": {"batch_size": 512, "epochs": 60, "lr": 1e-4, "optim": "Adam", "min_crop": MIN_CROP},
}
PRESETS = {"paper": {"n_views": 2}}  # its contrastive loss compares pairs of views


def of_tasks(name: str) -> str:
    """The defaults of a flag by task, for its help."""
    return ", ".join(f"{values[name]} for {task}" for task, values in TASK_DEFAULTS.items())


def parse(argv: Sequence[str]) -> Namespace:
    """Read the command line; flags that are not given get the task's defaults."""
    parser = options.make_parser(__doc__, None)
    add = parser.add_argument
    add(
        "--task",
        choices=TASK_DEFAULTS,
        required=True,
        help="Clean or Robust: a classifier; SSL: the head that compares views",
    )
    add("--epochs", type=at_least(int, 1), help=f"default {of_tasks('epochs')}")
    add("--lr", type=at_least(float, 0), help=f"peak learning rate; default {of_tasks('lr')}")
    add("--optim", choices=("Adam", "SGD"), help=f"default {of_tasks('optim')}")
    add("--at", choices=STEPS, default="fgsm-rs", help="adversarial training of Robust")
    add("--epsilon", type=at_least(float, 0.001, 255), default=8.0, help="its l_inf radius, /255")
    add("--loss", choices=SIMILARITIES, default="Cosine", help="similarity of views, SSL")
    options.add_view_flags(parser)
    add(
        "--cached-views",
        type=at_least(int, 0),
        default=0,
        metavar="K",
        help="SSL: store the features of K views per image; default 0 = new views at each step",
    )
    args = options.parse(parser, argv, "train.py", PRESETS)
    if 0 < args.cached_views < args.n_views:
        parser.error(f"--cached-views {args.cached_views} is fewer than --n-views {args.n_views}")
    for name, value in TASK_DEFAULTS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: Sequence[str] | None = None, logs: Path = LOGS) -> int:
    """Run one command line; return the exit code. logs: where run folders are."""
    args = parse(sys.argv[1:] if argv is None else argv)
    return options.run(train_head if args.task == "SSL" else train_classifier, args, logs)


if __name__ == "__main__":
    with script(INTERRUPT):
        sys.exit(main())
