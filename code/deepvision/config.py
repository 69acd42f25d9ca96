"""Every flag of main.py: its default, its help, and what values it refuses."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator

from deepvision.attacks.diagnostics import EPSILONS
from deepvision.training.objectives import STEPS
from deepvision.training.optim import DEFAULTS, SCENE_NET
from deepvision.training.signals import parse_interval

KIND_FLAGS = {
    "use_custom_conv": "custom_conv",
    "use_vit": "vit",
    "use_resnet18": "resnet18",
    "use_scene_net": "scene_net",
}


class OneLineParser(argparse.ArgumentParser):
    """Refuses in one line and points to --help."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def at_least(kind: type, low: float, high: float = float("inf")):
    """An argparse type: a number from `low` to `high`."""

    def number(text: str):
        value = kind(text)
        if not low <= value <= high or value == float("inf"):
            bounds = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    number.__name__ = kind.__name__
    return number


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def interval(text: str) -> str:
    try:
        parse_interval(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return text


def default_workers() -> int:
    """4, fewer on fewer cores (those this process may use)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, cores or 1)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Train, evaluate or attack a scene classifier.")
    add_running(parser)
    add_network(parser)
    add_training(parser)
    add_adversarial_training(parser)
    add_looking(parser)
    add_attack(parser)
    add_data(parser)
    return parser


def add_running(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data_folder", help="holds images/, train.txt and val.txt")
    add(
        "-j",
        "--workers",
        type=at_least(int, 0, 256),
        default=default_workers(),
        help="processes that load images",
    )
    add("-p", "--print-freq", type=at_least(int, 1), default=10, help="batches between lines")
    add("--seed", type=at_least(int, 0, 2**32 - 1), default=2024)
    add("--gpu", type=at_least(int, -1), help="id, the first by default; -1 = CPU")
    add("--use-mps", action="store_true", help="Apple's GPU")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="numbers of 16 bits; GPUs")
    add("--compile", action="store_true", help="torch.compile: minutes to start, faster steps")
    add("--deterministic", action="store_true", help="the same bits each time, on a GPU, too")


def add_network(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("network (default: SimpleNet)").add_argument
    add("--use-custom-conv", action="store_true", help="SimpleNet on our own convolution")
    add("--use-vit", action="store_true", help="SimpleViT")
    add("--use-resnet18", action="store_true", help="ResNet-18 with ImageNet weights")
    add("--use-scene-net", action="store_true", help="SceneNet, our own, with its own recipe")


def add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=at_least(int, 1), default=90)
    add("--start-epoch", type=at_least(int, 0), default=0, help="epochs taken as done already")
    add("-b", "--batch-size", type=at_least(int, 1), default=256)
    add("--lr", "--learning-rate", type=at_least(float, 0), help=by_recipe("lr"))
    add("--warmup", type=at_least(float, 0, 1e6), default=5, help="epochs")
    add("--momentum", type=at_least(float, 0, 1), default=0.9, help="SGD alone")
    add("--wd", "--weight-decay", type=at_least(float, 0), help=by_recipe("wd"))
    add(
        "--label-smoothing",
        type=at_least(float, 0, 1),
        help=f"spread over all categories; {by_recipe('label_smoothing')}",
    )
    add(
        "--cutmix",
        type=at_least(float, 0, 1),
        help=f"share of batches mixed; {by_recipe('cutmix')}",
    )
    add(
        "--ema",
        type=at_least(float, 0, 1),
        help=f"share of the run that weights are averaged over; {by_recipe('ema')}",
    )
    add("--clip-grad", type=at_least(float, 0), default=1.0, help="ViT only; 0 = off")
    add("--resume", default="", metavar="FILE", help="go on from it; auto = the newest run's")
    add("--weights", default="", metavar="FILE", help="begin a new run with its weights")
    add("--save-every", type=interval, default="10m", help="10m, 30s, or 200 (steps)")


def add_adversarial_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("adversarial training").add_argument
    add("--pgd", type=boolean, nargs="?", const=True, default=False, metavar="True|False")
    add("--at", choices=STEPS, help="a mode; --pgd means --at=pgd")
    add("--at-eps", type=at_least(float, 0), default=4.0, help="l_inf, in pixels of 0 to 255")
    add("--pgd-prob", type=at_least(float, 0, 1), default=1.0, help="share of batches attacked")
    add("--pgd-steps", type=at_least(int, 0), help=f"or replays; {defaults(STEPS)}")
    add("--pgd-blend", type=at_least(float, 0, 1), default=0.0, help="weight of clean pixels")
    add(
        "--best-by", choices=("clean", "robust"), default="clean", help="what model_best is best in"
    )


def add_looking(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("instead of training, with --resume").add_argument
    add("-e", "--evaluate", action="store_true", help="accuracy with mirror averaging")
    add("-a", "--attack", action="store_true", help="accuracy under the default attack")
    add("-v", "--vis", action="store_true", help="pictures to TensorBoard, with -e or -a")


def add_attack(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "-a with another attack: PGD, by default untargeted",
        "Radius and step count in pixels of 0 to 255: --attack-eps=4 is 4/255 (l2, l1: the norm).",
    ).add_argument
    add("--attack-norm", choices=EPSILONS, help="default linf")
    add("--attack-eps", type=at_least(float, 0), help=f"default {defaults(EPSILONS)}")
    add("--attack-steps", type=at_least(int, 0), help="default 10")
    add("--attack-step-size", type=at_least(float, 0), help="default 2.5 eps / steps")
    add("--attack-goal", choices=("untargeted", "least_likely", "random"))
    add("--attack-restarts", type=at_least(int, 1), help="the worst for each image; default 1")
    add("--sweep", action="store_true", help="accuracy over eps x steps, to TensorBoard as well")


def add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--cache",
        choices=("none", "ram", "disk", "device"),
        default="none",
        help="where decoded images are kept; device = the GPU",
    )
    add("--check-data", action="store_true", help="read every file, tell what is wrong, end")
    add("--skip-bad-images", action="store_true", help="do without those that cannot be read")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; adds `kind`, the network asked for, None for the default.

    Contradictions end the program with one line and exit code 2, before anything is created.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    kinds = [flag for flag in KIND_FLAGS if getattr(args, flag)]
    for message in contradictions(args, kinds, parser.get_default):
        parser.error(message)
    args.kind = KIND_FLAGS[kinds[0]] if kinds else None
    args.at = "pgd" if args.pgd else args.at
    return args


def contradictions(
    args: argparse.Namespace, kinds: list[str], default: Callable[[str], object]
) -> Iterator[str]:
    """Why these flags make no sense together."""
    passes = [f for f, on in (("-e", args.evaluate), ("-a", args.attack)) if on]
    if len(kinds) > 1:
        yield f"{' and '.join(map(spelled, kinds))} exclude each other"
    if len(passes) > 1:
        yield "-e and -a exclude each other: run one after the other"
    if args.check_data and passes:
        yield f"--check-data stands alone: leave {passes[0]} out"
    if passes and not args.resume:
        yield f"{passes[0]} needs --resume=FILE, the checkpoint to look at"
    if args.vis and not passes:
        yield "-v shows what -e or -a looked at: add one of them"
    yield from training_contradictions(args, passes, default)
    own = [f for f in vars(args) if f.startswith("attack_") and getattr(args, f) is not None]
    if not args.attack and (own or args.sweep):
        yield f"{spelled([*own, 'sweep'][0])} needs -a"
    if args.sweep and {"attack_eps", "attack_steps"} & set(own):
        yield "--sweep goes through eps and steps: leave --attack-eps and --attack-steps out"
    if args.use_mps and args.gpu is not None:
        yield "--use-mps and --gpu exclude each other"
    if args.resume and args.start_epoch:
        yield "--resume knows how many epochs are done: leave --start-epoch out"
    if args.start_epoch >= args.epochs:
        yield f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs} to do"


def training_contradictions(
    args: argparse.Namespace, passes: list[str], default: Callable[[str], object]
) -> Iterator[str]:
    for flag in ("pgd", "at", "weights"):
        if getattr(args, flag) and passes:
            yield f"{spelled(flag)} trains and {passes[0]} does not: leave one of them out"
    if args.pgd and args.at not in (None, "pgd"):
        yield f"--pgd means --at=pgd: leave it or --at={args.at} out"
    for flag in ("at_eps", "pgd_prob", "pgd_steps", "pgd_blend", "best_by"):
        if getattr(args, flag) != default(flag) and not (args.pgd or args.at):
            yield f"{spelled(flag)} needs --pgd or --at"
    if args.cutmix and (args.pgd or args.at):
        yield "--cutmix mixes images and --at attacks whole ones: leave one of them out"
    if args.pgd_blend and args.at in ("free", "trades"):
        yield f"--pgd-blend is not part of --at={args.at}: leave it out"
    if args.at == "free" and args.pgd_steps == 0:
        yield "--at=free replays each batch at least once: --pgd-steps=1 or more"
    if args.at == "fgsm-rs" and args.pgd_steps not in (None, 1):
        yield "--at=fgsm-rs takes one step: leave --pgd-steps out, or use --at=pgd"


def by_recipe(name: str) -> str:
    return f"default {DEFAULTS[name]:g}, with --use-scene-net {SCENE_NET[name]:g}"


def defaults(values: dict[str, int]) -> str:
    return ", ".join(f"{value} for {name}" for name, value in values.items())


def spelled(name: str) -> str:
    return "--" + name.replace("_", "-")
