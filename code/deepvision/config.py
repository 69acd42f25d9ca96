"""The settings of a run: flags, defaults, help and validation, in one frozen dataclass.

A new run takes its settings from the command line. A resumed run restores those that the command
line does not name from its checkpoint (`restore`). Network-specific defaults fill the rest
(`resolve_defaults`).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace

from deepvision.attacks.diagnostics import EPSILONS
from deepvision.runtime.provenance import command_line
from deepvision.training.objectives import STEPS
from deepvision.training.signals import parse_interval
from utils import UserError

DEFAULTS = {"lr": 0.1, "wd": 1e-4, "label_smoothing": 0.0, "cutmix": 0.0, "ema": 0.0}
SCENE_NET = {"lr": 0.2, "wd": 5e-4, "label_smoothing": 0.1, "cutmix": 0.5, "ema": 0.05}
NETWORK_DEFAULTS = {"scene_net": SCENE_NET}  # by kind of network; all others use DEFAULTS

NETWORK_FLAGS = {
    "use_custom_conv": "custom_conv",
    "use_vit": "vit",
    "use_resnet18": "resnet18",
    "use_scene_net": "scene_net",
}
EXAMPLES = """examples:
  python main.py ../data --epochs=60                                      train SimpleNet
  python main.py ../data --epochs=90 --wd 0.05 --lr 0.01 --use-vit        train SimpleViT
  python main.py ../data --resume=../logs/RUN                             resume a run
  python main.py ../data --resume=../logs/RUN -e -v                       evaluate its best network
  python main.py ../data --resume=../logs/RUN -a -v                       attack its best network
"""


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------


def at_least(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value == float("inf"):
            bounds = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    number.__name__ = kind.__name__
    return number


def boolean(text: str) -> bool:
    """An argparse type: True or False."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def interval(text: str) -> str:
    """An argparse type: minutes, seconds or steps, such as 10m, 30s or 200."""
    try:
        parse_interval(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return text


def norm(text: str) -> str:
    """An argparse type: linf, l2 or l1; l_inf, l_2 and l_1 are the same."""
    name = text.replace("_", "")
    if name not in EPSILONS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(EPSILONS)}")
    return name


def default_workers() -> int:
    """4, or fewer on a machine where this process may use fewer cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, cores or 1)


def listed(values: dict[str, int]) -> str:
    return ", ".join(f"{value} for {name}" for name, value in values.items())


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------

NETWORK, TRAINING = "network (default: SimpleNet)", "training"
ACTIONS = "evaluate or attack a trained network, with --resume or --weights"
SAVING, MACHINE, DATA = "resume and save", "machine and speed", "data"
ADVERSARIAL = "adversarial training"
ATTACK = "another attack for -a: PGD, by default untargeted"


def option(
    *flags: str,
    help: str,  # noqa: A002 - argparse's word
    group: str,
    default: object = None,
    restored: bool = True,
    **options: object,
) -> Field:
    """A setting with its flags. restored: a resumed run takes it from its checkpoint."""
    metadata = {"flags": flags, "group": group, "restored": restored}
    metadata["options"] = {"help": help, **options}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def switch(*flags: str, **options: object) -> Field:
    """A setting that its flag turns on."""
    return option(*flags, default=False, action="store_true", **options)


def by_network(name: str) -> str:
    return f"default {DEFAULTS[name]:g}, with --use-scene-net {SCENE_NET[name]:g}"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run. None: not named, and without a default that fits every network.

    named: the settings that the command line names; command: the command line, for records.
    """

    data_folder: str = option(group=DATA, help="folder with images/, train.txt and val.txt")

    use_custom_conv: bool = switch(
        "--use-custom-conv", group=NETWORK, restored=False, help="SimpleNet on CustomConv2d"
    )
    use_vit: bool = switch("--use-vit", group=NETWORK, restored=False, help="SimpleViT, AdamW")
    use_resnet18: bool = switch(
        "--use-resnet18", group=NETWORK, restored=False, help="ResNet-18 with ImageNet weights"
    )
    use_scene_net: bool = switch(
        "--use-scene-net", group=NETWORK, restored=False, help="SceneNet, our own network"
    )

    epochs: int = option(
        "--epochs", group=TRAINING, type=at_least(int, 1), default=90, help="training epochs"
    )
    batch_size: int = option(
        "-b",
        "--batch-size",
        group=TRAINING,
        type=at_least(int, 1),
        default=256,
        help="images per optimizer step, over all processes",
    )
    lr: float | None = option(
        "--lr",
        "--learning-rate",
        group=TRAINING,
        type=at_least(float, 0),
        help=f"peak learning rate; {by_network('lr')}",
    )
    warmup: float = option(
        "--warmup",
        group=TRAINING,
        type=at_least(float, 0, 1e6),
        default=5,
        help="epochs of linear warmup, before the cosine decay",
    )
    momentum: float = option(
        "--momentum", group=TRAINING, type=at_least(float, 0, 1), default=0.9, help="SGD only"
    )
    wd: float | None = option(
        "--wd",
        "--weight-decay",
        group=TRAINING,
        type=at_least(float, 0),
        help=f"weight decay; {by_network('wd')}",
    )
    clip_grad: float = option(
        "--clip-grad",
        group=TRAINING,
        type=at_least(float, 0),
        default=1.0,
        help="largest gradient norm, ViT only; 0 = off",
    )
    label_smoothing: float | None = option(
        "--label-smoothing",
        group=TRAINING,
        type=at_least(float, 0, 1),
        help=f"probability spread over all classes; {by_network('label_smoothing')}",
    )
    cutmix: float | None = option(
        "--cutmix",
        group=TRAINING,
        type=at_least(float, 0, 1),
        help=f"fraction of batches with CutMix; {by_network('cutmix')}",
    )
    ema: float | None = option(
        "--ema",
        group=TRAINING,
        type=at_least(float, 0, 1),
        help=f"fraction of the run that the weights' moving average spans; {by_network('ema')}",
    )
    seed: int = option(
        "--seed",
        group=TRAINING,
        type=at_least(int, 0, 2**32 - 1),
        default=2024,
        help="seed of weights, order, augmentation and attacks",
    )
    start_epoch: int = option(
        "--start-epoch",
        group=TRAINING,
        type=at_least(int, 0),
        default=0,
        restored=False,
        help="epochs to count as done",
    )

    evaluate: bool = switch(
        "-e", "--evaluate", group=ACTIONS, restored=False, help="accuracy, averaged with the mirror"
    )
    attack: bool = switch(
        "-a", "--attack", group=ACTIONS, restored=False, help="accuracy under the default attack"
    )
    vis: bool = switch(
        "-v", "--vis", group=ACTIONS, restored=False, help="images to TensorBoard, with -e or -a"
    )

    resume: str = option(
        "--resume",
        group=SAVING,
        metavar="PATH",
        default="",
        restored=False,
        help="checkpoint or run folder to resume; auto = the newest run",
    )
    weights: str = option(
        "--weights",
        group=SAVING,
        metavar="FILE",
        default="",
        help="checkpoint whose weights a new run starts from",
    )
    save_every: str = option(
        "--save-every",
        group=SAVING,
        type=interval,
        default="10m",
        metavar="INTERVAL",
        help="time or steps between checkpoints: 10m, 30s or 200",
    )
    print_freq: int = option(
        "-p",
        "--print-freq",
        group=SAVING,
        type=at_least(int, 1),
        default=10,
        help="batches between two printed lines",
    )
    best_by: str = option(
        "--best-by",
        group=SAVING,
        choices=("clean", "robust"),
        default="clean",
        help="metric that selects model_best; robust needs --at",
    )

    gpu: int | None = option(
        "--gpu",
        group=MACHINE,
        type=at_least(int, -1),
        restored=False,
        help="index of the GPU; -1 = CPU; default: the first GPU, or the CPU",
    )
    use_mps: bool = switch("--use-mps", group=MACHINE, restored=False, help="use Apple's GPU")
    workers: int = option(
        "-j",
        "--workers",
        group=MACHINE,
        type=at_least(int, 0, 256),
        default=default_workers,
        restored=False,
        help="processes that load images; default 4, fewer on fewer cores",
    )
    amp: str = option(
        "--amp",
        group=MACHINE,
        choices=("off", "bf16", "fp16"),
        default="off",
        help="mixed precision",
    )
    compile: bool = switch(
        "--compile", group=MACHINE, help="torch.compile: a minute to start, then faster steps"
    )
    deterministic: bool = switch(
        "--deterministic", group=MACHINE, help="the same bits from every run on the same GPU"
    )
    cache: str = option(
        "--cache",
        group=MACHINE,
        choices=("none", "ram", "disk", "device"),
        default="none",
        help="decode each image once and keep it; device = on the GPU",
    )

    check_data: bool = switch(
        "--check-data", group=DATA, restored=False, help="read every file, report faults, exit"
    )
    skip_bad_images: bool = switch(
        "--skip-bad-images", group=DATA, help="leave out images that cannot be read"
    )

    pgd: bool = option(
        "--pgd",
        group=ADVERSARIAL,
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        restored=False,
        metavar="True|False",
        help="the same as --at=pgd",
    )
    at: str | None = option("--at", group=ADVERSARIAL, choices=tuple(STEPS), help="training mode")
    at_eps: float = option(
        "--at-eps",
        group=ADVERSARIAL,
        type=at_least(float, 0),
        default=4.0,
        help="l_inf radius in 8-bit intensity levels (0-255)",
    )
    pgd_prob: float = option(
        "--pgd-prob",
        group=ADVERSARIAL,
        type=at_least(float, 0, 1),
        default=1.0,
        help="fraction of batches to attack",
    )
    pgd_steps: int | None = option(
        "--pgd-steps",
        group=ADVERSARIAL,
        type=at_least(int, 0),
        help=f"attack steps, or replays of a batch; {listed(STEPS)}",
    )
    pgd_blend: float = option(
        "--pgd-blend",
        group=ADVERSARIAL,
        type=at_least(float, 0, 1),
        default=0.0,
        help="weight of the clean image in an attacked one",
    )

    attack_norm: str | None = option(
        "--attack-norm",
        group=ATTACK,
        type=norm,
        restored=False,
        metavar="NORM",
        help="linf, l2 or l1; default linf",
    )
    attack_eps: float | None = option(
        "--attack-eps",
        group=ATTACK,
        type=at_least(float, 0),
        restored=False,
        help=f"radius in 8-bit intensity levels: 4 is 4/255; default {listed(EPSILONS)}",
    )
    attack_steps: int | None = option(
        "--attack-steps",
        group=ATTACK,
        type=at_least(int, 0),
        restored=False,
        help="number of steps; default 10",
    )
    attack_step_size: float | None = option(
        "--attack-step-size",
        group=ATTACK,
        type=at_least(float, 0),
        restored=False,
        help="size of a step in 8-bit intensity levels; default 2.5 eps / steps",
    )
    attack_goal: str | None = option(
        "--attack-goal",
        group=ATTACK,
        choices=("untargeted", "least_likely", "random"),
        restored=False,
        help="label to leave or to reach; default untargeted",
    )
    attack_restarts: int | None = option(
        "--attack-restarts",
        group=ATTACK,
        type=at_least(int, 1),
        restored=False,
        help="random starts, the worst counts for each image; default 1",
    )
    sweep: bool = switch(
        "--sweep", group=ATTACK, restored=False, help="accuracy over a grid of eps and steps"
    )

    named: frozenset[str] = frozenset()
    command: str = ""

    @property
    def network(self) -> str | None:
        """The kind of network that the command line names; None: the default, or the file's."""
        chosen = [kind for flag, kind in NETWORK_FLAGS.items() if getattr(self, flag)]
        return chosen[0] if chosen else None

    @property
    def device(self) -> str:
        """The name of the device, as `runtime.device.choose_device` takes it."""
        if self.use_mps:
            return "mps"
        if self.gpu is None:
            return "auto"
        return "cpu" if self.gpu == -1 else f"cuda:{self.gpu}"

    @property
    def trains(self) -> bool:
        """Whether this run trains, rather than evaluates or attacks."""
        return not (self.evaluate or self.attack)

    def as_dict(self) -> dict:
        """The settings as plain values, for config.json and checkpoints."""
        return {f.name: getattr(self, f.name) for f in settings()}

    def resume_command(self, path: str) -> str:
        """The command that resumes from `path`: the machine's settings are not in a checkpoint."""
        machine = [
            f"{spelled(f)}={getattr(self, f)}" for f in ("gpu", "workers") if f in self.named
        ]
        machine += ["--use-mps"] if self.use_mps else []
        return shlex.join(["python", "main.py", self.data_folder, f"--resume={path}", *machine])


def settings() -> list[Field]:
    """The dataclass fields that are settings."""
    return [f for f in fields(RunConfig) if f.metadata]


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Reports an error in one line; underscores in flags are read as hyphens."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def parse_known_args(self, args=None, namespace=None):
        if args is not None and not any("_" in flag for flag in self._option_string_actions):
            args = [re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), a) for a in args]
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """The parser of main.py's flags; its namespace holds the named settings only."""
    parser = OneLineParser(
        usage="%(prog)s DATA_FOLDER [flags]",
        description="Train, evaluate or attack a scene classifier.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    groups = {}
    for f in settings():
        name, options = f.metadata["group"], dict(f.metadata["options"])
        if not f.metadata["flags"]:
            parser.add_argument(f.name, **options)
            continue
        group = groups.setdefault(name, None) or parser.add_argument_group(name)
        groups[name] = group
        default = f.default if f.default_factory is MISSING else None
        if default not in (None, False, ""):
            options["help"] += f"; default {default}"
        group.add_argument(*f.metadata["flags"], dest=f.name, **options)
    return parser


def parse(argv: Sequence[str], script: str = "main.py") -> RunConfig:
    """Read the command line, without the script's name.

    A contradiction exits with one line and code 2, before anything is created.
    """
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    if "pgd" in given and "at" not in given:
        given["at"] = "pgd" if given["pgd"] else None
    command = command_line([script, *argv])
    config = RunConfig(**given, named=frozenset(given), command=command)
    for message in contradictions(config):
        parser.error(message)
    return config


def contradictions(config: RunConfig) -> Iterator[str]:
    """The reasons why these settings make no sense together."""
    networks = [flag for flag in NETWORK_FLAGS if getattr(config, flag)]
    actions = [f for f, on in (("-e", config.evaluate), ("-a", config.attack)) if on]
    if len(networks) > 1:
        yield f"{' and '.join(map(spelled, networks))} exclude each other"
    if len(actions) > 1:
        yield "-e and -a exclude each other: run one after the other"
    if config.check_data and actions:
        yield f"--check-data does nothing else: leave {actions[0]} out"
    if actions and not config.resume:
        yield f"{actions[0]} needs --resume=FILE, the checkpoint to look at"
    if config.vis and not actions:
        yield "-v shows what -e or -a looked at: add one of them"
    attack_flags = [f for f in sorted(config.named) if f.startswith("attack_")]
    if not config.attack and (attack_flags or config.sweep):
        yield f"{spelled([*attack_flags, 'sweep'][0])} needs -a"
    if config.sweep and {"attack_eps", "attack_steps"} & config.named:
        yield "--sweep covers all eps and steps: leave --attack-eps and --attack-steps out"
    if config.use_mps and config.gpu is not None:
        yield "--use-mps and --gpu exclude each other"
    if config.resume and config.start_epoch:
        yield "--resume knows how many epochs are done: leave --start-epoch out"
    if config.start_epoch >= config.epochs:
        yield f"--start-epoch {config.start_epoch} leaves nothing of --epochs {config.epochs} to do"
    if actions:
        for flag in ("pgd", "at", "weights"):
            if getattr(config, flag):
                yield f"{spelled(flag)} trains and {actions[0]} does not: leave one of them out"
    if not config.resume:  # a resumed run restores settings first
        yield from training_contradictions(config)


def training_contradictions(config: RunConfig) -> Iterator[str]:
    """The reasons why these settings of adversarial training make no sense together."""
    if config.pgd and config.at != "pgd":
        yield f"--pgd means --at=pgd: leave it or --at={config.at} out"
    needs_mode = {"at_eps", "pgd_prob", "pgd_steps", "pgd_blend", "best_by"}
    for f in settings():
        if f.name in needs_mode and getattr(config, f.name) != f.default and not config.at:
            yield f"{spelled(f.name)} needs --pgd or --at"
    if config.cutmix and config.at:
        yield "--cutmix mixes images and --at attacks whole ones: leave one of them out"
    if config.pgd_blend and config.at in ("free", "trades"):
        yield f"--pgd-blend is not part of --at={config.at}: leave it out"
    if config.at == "free" and config.pgd_steps == 0:
        yield "--at=free replays each batch at least once: --pgd-steps=1 or more"
    if config.at == "fgsm-rs" and config.pgd_steps not in (None, 1):
        yield "--at=fgsm-rs takes one step: leave --pgd-steps out, or use --at=pgd"


def spelled(name: str) -> str:
    """A setting as its flag."""
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------------------------------------
# Defaults of a network, settings of a resumed run
# ---------------------------------------------------------------------------------------------


def resolve_defaults(config: RunConfig, kind: str) -> RunConfig:
    """`config` with the network's defaults for settings that are None. --at turns CutMix off."""
    defaults = NETWORK_DEFAULTS.get(kind, DEFAULTS)
    if config.at:
        defaults = defaults | {"cutmix": 0.0}
    return replace(config, **{k: v for k, v in defaults.items() if getattr(config, k) is None})


def restore(config: RunConfig, saved: dict) -> tuple[RunConfig, dict[str, tuple]]:
    """`config` with the saved settings that the command line does not name.

    Returns it with what the command line changes: {name: (old, new)}.

    Raises:
        UserError: a saved value is invalid, or contradicts a named one.
    """
    restored, changed = {}, {}
    for f in settings():
        if not f.metadata["restored"] or not f.metadata["flags"] or f.name not in saved:
            continue
        value = valid_value(f, saved[f.name])
        if f.name not in config.named:
            restored[f.name] = value
        elif value != getattr(config, f.name):
            changed[f.name] = value, getattr(config, f.name)
    config = replace(config, **restored)
    for message in training_contradictions(config):
        raise UserError(f"{message} (the run's settings are restored: a named flag overrides them)")
    return config, changed


def valid_value(f: Field, value: object) -> object:
    """A saved value, if the command line would accept it too.

    Raises:
        UserError: it would not.
    """
    options = f.metadata["options"]
    try:
        if value is None and f.default is None:
            return None
        if options.get("action") == "store_true":
            if not isinstance(value, bool):
                raise ValueError
            return value
        if "choices" in options and value not in options["choices"]:
            raise ValueError
        if not isinstance(value, (int, float, str)):
            raise ValueError
        return options.get("type", str)(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        raise UserError(f"the checkpoint's setting {f.name} = {value!r:.40} is invalid") from None
