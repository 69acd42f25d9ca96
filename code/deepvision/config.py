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
from dataclasses import MISSING, dataclass, field, fields, replace

from deepvision.attacks import EPSILONS, LOSSES
from deepvision.attacks.autoattack import VERSIONS
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
    """Values by name, for help texts."""
    return ", ".join(f"{value} for {name}" for name, value in values.items())


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run. None: not named, and without a default that fits every network.

    named: the settings that the command line names; script: main.py as it was called; command: the
    command line, for records.
    """

    data_folder: str
    # the network
    use_custom_conv: bool = False
    use_vit: bool = False
    use_resnet18: bool = False
    use_scene_net: bool = False
    # training
    epochs: int = 90
    batch_size: int = 256
    lr: float | None = None
    warmup: float = 5
    momentum: float = 0.9
    wd: float | None = None
    clip_grad: float = 1.0
    label_smoothing: float | None = None
    cutmix: float | None = None
    ema: float | None = None
    seed: int = 2024
    start_epoch: int = 0
    # evaluation
    evaluate: bool = False
    attack: bool = False
    vis: bool = False
    # checkpoints
    resume: str = ""
    weights: str = ""
    save_every: str = "10m"
    print_freq: int = 10
    best_by: str = "clean"
    # the machine
    gpu: int | None = None
    use_mps: bool = False
    workers: int = field(default_factory=default_workers)
    amp: str = "off"
    compile: bool = False
    deterministic: bool = False
    cache: str = "none"
    # data
    check_data: bool = False
    skip_bad_images: bool = False
    # adversarial training
    pgd: bool = False
    at: str | None = None
    at_eps: float = 4.0
    pgd_prob: float = 1.0
    pgd_steps: int | None = None
    pgd_blend: float = 0.0
    # another attack for -a
    attack_norm: str | None = None
    attack_eps: float | None = None
    attack_steps: int | None = None
    attack_step_size: float | None = None
    attack_goal: str | None = None
    attack_restarts: int | None = None
    attack_loss: str | None = None
    attack_suite: str | None = None
    attack_images: int | None = None
    sweep: bool = False

    named: frozenset[str] = frozenset()
    script: str = "main.py"
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
        return {name: getattr(self, name) for name in SETTINGS}

    def resume_command(self, path: str) -> str:
        """The command that resumes from `path`: the machine's settings are not in a checkpoint."""
        machine = [
            f"{spelled(f)}={getattr(self, f)}" for f in ("gpu", "workers") if f in self.named
        ]
        machine += ["--use-mps"] if self.use_mps else []
        return shlex.join(["python", self.script, self.data_folder, f"--resume={path}", *machine])


SETTINGS = {
    f.name: f.default for f in fields(RunConfig) if f.name not in ("named", "script", "command")
}

# What a resumed run takes from its own command line only: its action, its network (which the
# checkpoint knows), its files and its machine
NOT_RESTORED = {"data_folder", *NETWORK_FLAGS, "start_epoch", "resume", "pgd", "check_data"}
NOT_RESTORED |= {"evaluate", "attack", "vis", "sweep", "gpu", "use_mps", "workers"}
NOT_RESTORED |= {name for name in SETTINGS if name.startswith("attack_")}


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Reports an error in one line; underscores in flags are read as hyphens."""

    def error(self, message: str) -> None:
        """Print the error in one line; exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def parse_known_args(self, args=None, namespace=None):
        """argparse's, after `--use_vit` has become `--use-vit` (the course's spelling)."""
        if args is not None and not any("_" in flag for flag in self._option_string_actions):
            args = [re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), a) for a in args]
        return super().parse_known_args(args, namespace)


Flag = tuple[str, str, dict]  # flags, help, options of add_argument


def flag(names: str, text: str, kind: Callable | tuple | None = None, **options: object) -> Flag:
    """A flag with its help. kind: a converter or the choices; None: a switch."""
    if kind is None:
        options["action"] = "store_true"
    elif isinstance(kind, tuple):
        options["choices"] = kind
    else:
        options["type"] = kind
    return names, text, options


def by_network(name: str) -> str:
    """The help of a default that depends on the network."""
    return f"default {DEFAULTS[name]:g}, with --use-scene-net {SCENE_NET[name]:g}"


fraction, positive, count = at_least(float, 0, 1), at_least(float, 0), at_least(int, 1)
FLAGS: dict[str, list[Flag]] = {
    "network (default: SimpleNet)": [
        flag("--use-custom-conv", "SimpleNet on CustomConv2d"),
        flag("--use-vit", "SimpleViT, trained with AdamW"),
        flag("--use-resnet18", "ResNet-18 with ImageNet weights"),
        flag("--use-scene-net", "SceneNet, our own network, with its own defaults"),
    ],
    "training": [
        flag("--epochs", "number of epochs", count),
        flag("-b --batch-size", "images per step, over all processes", count),
        flag("--lr --learning-rate", f"peak learning rate; {by_network('lr')}", positive),
        flag("--warmup", "epochs of linear warmup before the cosine", at_least(float, 0, 1e6)),
        flag("--momentum", "momentum of SGD", fraction),
        flag("--wd --weight-decay", f"weight decay; {by_network('wd')}", positive),
        flag("--clip-grad", "largest gradient norm, ViT only; 0 = off", positive),
        flag("--label-smoothing", f"label smoothing; {by_network('label_smoothing')}", fraction),
        flag("--cutmix", f"fraction of batches with CutMix; {by_network('cutmix')}", fraction),
        flag("--ema", f"fraction of the run that EMA spans; {by_network('ema')}", fraction),
        flag(
            "--seed", "seed of weights, order, augmentation, attacks", at_least(int, 0, 2**32 - 1)
        ),
        flag("--start-epoch", "epochs to count as done", at_least(int, 0)),
    ],
    "evaluate or attack a trained network, with --resume": [
        flag("-e --evaluate", "accuracy, plain and averaged with the mirror images"),
        flag("-a --attack", "accuracy under the assignment's attack"),
        flag("-v --vis", "images to TensorBoard, with -e or -a"),
    ],
    "resume and save": [
        flag("--resume", "checkpoint or run folder; auto = the newest run", str, metavar="PATH"),
        flag("--weights", "checkpoint that a new run starts from", str, metavar="FILE"),
        flag("--save-every", "time or steps between checkpoints: 10m, 30s, 200", interval),
        flag("-p --print-freq", "batches between two printed lines", count),
        flag("--best-by", "metric that selects model_best; robust needs --at", ("clean", "robust")),
    ],
    "machine and speed": [
        flag(
            "--gpu", "index of the GPU, -1 = CPU; default: the first GPU, if any", at_least(int, -1)
        ),
        flag("--use-mps", "use Apple's GPU"),
        flag("-j --workers", "loader processes; default 4 or the cores", at_least(int, 0, 256)),
        flag("--amp", "mixed precision", ("off", "bf16", "fp16")),
        flag("--compile", "torch.compile: a minute to start, then faster steps"),
        flag("--deterministic", "the same bits from every run on the same GPU"),
        flag(
            "--cache", "keep decoded images; device = on the GPU", ("none", "ram", "disk", "device")
        ),
    ],
    "data": [
        flag("--check-data", "read every file, report faults, exit"),
        flag("--skip-bad-images", "leave out images that cannot be read"),
    ],
    "adversarial training": [
        flag("--pgd", "the same as --at=pgd", boolean, nargs="?", const=True, metavar="True|False"),
        flag("--at", "mode of adversarial training", tuple(STEPS)),
        flag("--at-eps", "l_inf radius in 8-bit intensity levels (0-255)", positive),
        flag("--pgd-prob", "fraction of batches to attack", fraction),
        flag("--pgd-steps", f"attack steps, or replays; {listed(STEPS)}", at_least(int, 0)),
        flag("--pgd-blend", "weight of the clean image in an attacked one", fraction),
    ],
    "another attack for -a: PGD, by default untargeted; lengths in 8-bit levels (4 = 4/255)": [
        flag("--attack-norm", "linf, l2 or l1; default linf", norm, metavar="NORM"),
        flag("--attack-eps", f"radius; default {listed(EPSILONS)}", positive),
        flag("--attack-steps", "number of steps; default 10", at_least(int, 0)),
        flag("--attack-step-size", "size of a step; default 2.5 eps / steps", positive),
        flag("--attack-goal", "goal of the attack", ("untargeted", "least_likely", "random")),
        flag("--attack-restarts", "random starts, of which the worst counts; default 1", count),
        flag("--attack-loss", "loss to ascend; default ce", tuple(LOSSES)),
        flag("--sweep", "accuracy over a grid of eps and steps"),
        flag("--attack-suite", "AutoAttack's set instead; rand: randomised networks", VERSIONS),
        flag("--attack-images", "validation images for --attack-suite; default 1000", count),
    ],
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of main.py's flags; its namespace holds the named settings only."""
    parser = OneLineParser(
        usage="%(prog)s DATA_FOLDER [flags]",
        description="Train, evaluate or attack a scene classifier.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("data_folder", help="folder with images/, train.txt and val.txt")
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for names, text, options in flags:
            action = group.add_argument(*names.split(), dest=setting(names), help=text, **options)
            default = SETTINGS[action.dest]
            if default not in (None, False, "", MISSING):
                action.help += f"; default {default}"
    return parser


def setting(names: str) -> str:
    """The setting of a flag: the first long name, but --evaluate for -e."""
    long = next(name for name in names.split() if name.startswith("--"))
    return long[2:].replace("-", "_")


def parse(argv: Sequence[str], script: str = "main.py") -> RunConfig:
    """Read the command line, without the script's name.

    A contradiction exits with one line and code 2, before anything is created.
    """
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    if "pgd" in given and "at" not in given:
        given["at"] = "pgd" if given["pgd"] else None
    command = command_line([script, *argv])
    config = RunConfig(**given, named=frozenset(given), script=script, command=command)
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
    single = config.named & {
        f"attack_{n}" for n in ("steps", "step_size", "goal", "restarts", "loss")
    }
    if config.attack_suite and (single or config.sweep):
        yield f"--attack-suite sets its attacks: leave {spelled([*sorted(single), 'sweep'][0])} out"
    if config.attack_images and not config.attack_suite:
        yield "--attack-images needs --attack-suite"
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
    for name in ("at_eps", "pgd_prob", "pgd_steps", "pgd_blend", "best_by"):
        if getattr(config, name) != SETTINGS[name] and not config.at:
            yield f"{spelled(name)} needs --pgd or --at"
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
    for name in (saved.keys() & SETTINGS.keys()) - NOT_RESTORED:
        value = valid_value(name, saved[name])
        if name not in config.named:
            restored[name] = value
        elif value != getattr(config, name):
            changed[name] = value, getattr(config, name)
    config = replace(config, **restored)
    for message in training_contradictions(config):
        raise UserError(f"{message} (the run's settings are restored: a named flag overrides them)")
    return config, changed


def valid_value(name: str, value: object) -> object:
    """A saved value of a setting, if the command line would accept it too.

    Raises:
        UserError: it would not.
    """
    default = SETTINGS[name]
    if value is None and default is None or isinstance(value, bool) and isinstance(default, bool):
        return value
    names = next(n for flags in FLAGS.values() for n, *_ in flags if setting(n) == name)
    flag = next(n for n in names.split() if n.startswith("--"))
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        parser = build_parser()
        parser.exit_on_error = False
        return getattr(parser.parse_args(["-", f"{flag}={value}"]), name)
    except (ValueError, argparse.ArgumentError, SystemExit):
        raise UserError(f"the checkpoint's setting {name} = {value!r:.40} is invalid") from None
