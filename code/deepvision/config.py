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
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from deepvision.attacks import EPSILONS, LOSSES
from deepvision.attacks.autoattack import VERSIONS
from deepvision.data.augmentation import parse_resolution, sizes_by_epoch
from deepvision.runtime.provenance import command_line
from deepvision.training.objectives import STEPS
from deepvision.training.signals import parse_interval
from utils import UserError

# The course's augmentation, and that of runs from before these settings
AUGMENTATION = {"resolution": "128", "crop_area": 0.25, "rotation": 15.0}
DEFAULTS = {"lr": 0.1, "wd": 1e-4, "label_smoothing": 0.0, "cutmix": 0.0, "ema": 0.0}
DEFAULTS |= AUGMENTATION
SCENE_NET = {"lr": 0.2, "wd": 5e-4, "label_smoothing": 0.1, "cutmix": 0.25, "ema": 0.05}
SCENE_NET |= {"resolution": "112:0.6,128", "crop_area": 0.35, "rotation": 0.0, "warmup": 3}
CPU = {"epochs": 40, "batch_size": 128, "warmup": 1.5, "cutmix": 0.0, "amp": "bf16"}
CPU |= {"resolution": "96:0.6,112:0.85,128"}
RECIPES = {"gpu": SCENE_NET, "cpu": SCENE_NET | CPU}  # of SceneNet; other networks use DEFAULTS

NETWORK_FLAGS = {
    "use_custom_conv": "custom_conv",
    "use_vit": "vit",
    "use_resnet18": "resnet18",
    "use_scene_net": "scene_net",
}
DEVICE_HELP = "index of the GPU, -1 = CPU; also cpu, cuda:N, mps; default: the first GPU, if any"
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


def size_schedule(text: str) -> str:
    """An argparse type: sizes with the fraction of the run at which each ends."""
    try:
        parse_resolution(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no schedule: 96:0.6,128 means 96 pixels for 60 % of the run, then 128"
        ) from None
    return text


def norm(text: str) -> str:
    """An argparse type: linf, l2 or l1; l_inf, l_2 and l_1 are the same."""
    name = text.replace("_", "")
    if name not in EPSILONS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(EPSILONS)}")
    return name


def device_id(text: str) -> int | str:
    """An argparse type: a GPU's index, -1 = CPU; or a device's name, see `choose_device`."""
    return text if text[:1].isalpha() else at_least(int, -1)(text)


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


def flag(
    default: object,
    text: str,
    kind: Callable | tuple | None = None,
    also: str = "",
    **options: object,
) -> Any:
    """A setting with its flag, which has its name.

    text: the help, to which the default is added.
    kind: a converter or the choices; None: a switch.
    also: other names of the flag.
    options: of argparse's add_argument.
    """
    if kind is None:
        options["action"] = "store_true"
    elif isinstance(kind, tuple):
        options["choices"] = kind
    else:
        options["type"] = kind
    if default not in (None, False, ""):
        text = f"{text}; default {default}"
    return field(default=default, metadata={"names": also.split(), "help": text, **options})


def by_network(name: str) -> str:
    """The help of a default that depends on the network."""
    course, scene_net = (str(d[name]).removesuffix(".0") for d in (DEFAULTS, SCENE_NET))
    return f"default {course}, with --use-scene-net {scene_net}"


fraction, positive, count = at_least(float, 0, 1), at_least(float, 0), at_least(int, 1)

# The groups of --help, by the first setting of each
GROUPS = {
    "use_custom_conv": "network (default: SimpleNet)",
    "epochs": "training",
    "evaluate": "evaluate or attack a trained network, with --resume or --weights",
    "resume": "resume and save",
    "gpu": "machine and speed",
    "check_data": "data",
    "pgd": "adversarial training",
    "attack_norm": "another attack for -a: PGD, by default untargeted; "
    "lengths in 8-bit levels (4 = 4/255)",
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run. None: not named, and without a default that fits every network.

    named: the settings that the command line names; script: main.py as it was called; command: the
    command line, for records.
    """

    data_folder: str

    use_custom_conv: bool = flag(False, "SimpleNet on CustomConv2d")
    use_vit: bool = flag(False, "SimpleViT, trained with AdamW")
    use_resnet18: bool = flag(False, "ResNet-18 with ImageNet weights")
    use_scene_net: bool = flag(False, "SceneNet, our own network, with its own defaults")
    recipe: str | None = flag(None, "size and defaults of SceneNet; default gpu", tuple(RECIPES))

    epochs: int = flag(90, "number of epochs", count)
    batch_size: int = flag(256, "images per step, over all processes", count, also="-b")
    lr: float | None = flag(
        None, f"peak learning rate; {by_network('lr')}", positive, also="--learning-rate"
    )
    warmup: float = flag(5, "epochs of linear warmup before the cosine", at_least(float, 0, 1e6))
    momentum: float = flag(0.9, "momentum of SGD", fraction)
    wd: float | None = flag(
        None, f"weight decay; {by_network('wd')}", positive, also="--weight-decay"
    )
    clip_grad: float = flag(1.0, "largest gradient norm, ViT only; 0 = off", positive)
    label_smoothing: float | None = flag(
        None, f"label smoothing; {by_network('label_smoothing')}", fraction
    )
    cutmix: float | None = flag(
        None, f"fraction of batches with CutMix; {by_network('cutmix')}", fraction
    )
    ema: float | None = flag(
        None, f"fraction of the run that EMA spans; {by_network('ema')}", fraction
    )
    resolution: str | None = flag(
        None,
        f"pixels of a training image, by fraction of the run; {by_network('resolution')}",
        size_schedule,
        metavar="SIZE:END,...,SIZE",
    )
    crop_area: float | None = flag(
        None,
        f"least area of a random crop, as a fraction; {by_network('crop_area')}",
        at_least(float, 0.01, 1),
    )
    rotation: float | None = flag(
        None, f"largest rotation in degrees; {by_network('rotation')}", at_least(float, 0, 180)
    )
    seed: int = flag(
        2024, "seed of weights, order, augmentation, attacks", at_least(int, 0, 2**32 - 1)
    )
    start_epoch: int = flag(0, "epochs to count as done", at_least(int, 0))

    evaluate: bool = flag(False, "accuracy, plain and averaged with the mirror images", also="-e")
    attack: bool = flag(False, "accuracy under the assignment's attack", also="-a")
    vis: bool = flag(False, "images to TensorBoard, with -e or -a", also="-v")
    views: bool = flag(False, "with -e: larger views of each image as well, and their mean")

    resume: str = flag("", "checkpoint or run folder; auto = the newest run", str, metavar="PATH")
    weights: str = flag(
        "",
        "checkpoint that a new run starts from, or that -e and -a look at; simplenet, simplevit, "
        "scene_net: those of results/weights",
        str,
        metavar="FILE",
    )
    save_every: str = flag(
        "10m", "time or steps between checkpoints: 10m, 30s, 200", interval, metavar="TIME"
    )
    print_freq: int = flag(10, "batches between two printed lines", count, also="-p")
    best_by: str = flag(
        "clean", "metric that selects model_best; robust needs --at", ("clean", "robust")
    )

    gpu: int | str | None = flag(None, DEVICE_HELP, device_id, also="--device", metavar="N")
    use_mps: bool = flag(False, "use Apple's GPU")
    workers: int = flag(
        default_workers(),
        "loader processes, at most 4 by default",
        at_least(int, 0, 256),
        also="-j",
    )
    amp: str = flag("off", "mixed precision", ("off", "bf16", "fp16"))
    compile: bool = flag(False, "torch.compile: a minute to start, then faster steps")
    deterministic: bool = flag(False, "the same bits from every run on the same GPU")
    cache: str = flag(
        "auto",
        "keep decoded images; device = on the GPU; auto = there, for 2 epochs or more",
        ("auto", "none", "ram", "disk", "device"),
    )

    check_data: bool = flag(False, "read every file, report faults, exit")
    skip_bad_images: bool = flag(False, "leave out images that cannot be read")

    pgd: bool = flag(
        False, "the same as --at=pgd", boolean, nargs="?", const=True, metavar="True|False"
    )
    at: str | None = flag(None, "mode of adversarial training", tuple(STEPS))
    at_eps: float = flag(4.0, "l_inf radius in 8-bit intensity levels (0-255)", positive)
    pgd_prob: float = flag(1.0, "fraction of batches to attack", fraction)
    pgd_steps: int | None = flag(
        None, f"attack steps, or replays; {listed(STEPS)}", at_least(int, 0)
    )
    pgd_blend: float = flag(0.0, "weight of the clean image in an attacked one", fraction)

    attack_norm: str | None = flag(None, "linf, l2 or l1; default linf", norm, metavar="NORM")
    attack_eps: float | None = flag(None, f"radius; default {listed(EPSILONS)}", positive)
    attack_steps: int | None = flag(None, "number of steps; default 10", at_least(int, 0))
    attack_step_size: float | None = flag(None, "size of a step; default 2.5 eps / steps", positive)
    attack_goal: str | None = flag(
        None, "goal of the attack", ("untargeted", "least_likely", "random")
    )
    attack_restarts: int | None = flag(
        None, "random starts, of which the worst counts; default 1", count
    )
    attack_loss: str | None = flag(None, "loss to ascend; default ce", tuple(LOSSES))
    sweep: bool = flag(False, "accuracy over a grid of eps and steps")
    attack_suite: str | None = flag(
        None, "AutoAttack's set instead; rand: randomised networks", VERSIONS
    )
    attack_images: int | None = flag(
        None, "validation images for --attack-suite; default 1000", count
    )

    named: frozenset[str] = frozenset()
    script: str = "main.py"
    command: str = ""

    @property
    def augmentation(self) -> dict | None:
        """Arguments of `data.augmentation.adapt_augmentation`; None for the course's settings."""
        if all(getattr(self, name) == value for name, value in AUGMENTATION.items()):
            return None
        sizes = sizes_by_epoch(parse_resolution(self.resolution), self.epochs)
        return {"sizes": sizes, "crop_area": self.crop_area, "rotation": self.rotation}

    @property
    def network(self) -> str | None:
        """The kind of network that the command line names; None: the default, or the file's."""
        chosen = [kind for flag, kind in NETWORK_FLAGS.items() if getattr(self, flag)]
        return chosen[0] if chosen else None

    @property
    def device(self) -> int | str | None:
        """The device, as `runtime.device.choose_device` takes it."""
        return "mps" if self.use_mps else self.gpu

    @property
    def trains(self) -> bool:
        """Whether this run trains, rather than evaluates or attacks."""
        return not (self.evaluate or self.attack)

    @property
    def memory_advice(self) -> str:
        """What to do where the GPU's memory is too small for this command."""
        if self.trains:
            smaller = f"use a smaller batch size (-b {max(1, self.batch_size // 2)})"
            return f"{smaller} or --cache=none" if self.cache in ("auto", "device") else smaller
        if self.attack_suite:
            return "use a smaller --attack-images"
        return "end what else runs on the GPU (nvidia-smi lists it), or use --gpu=-1"

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
NOT_RESTORED |= {"evaluate", "attack", "vis", "views", "sweep", "gpu", "use_mps", "workers"}
NOT_RESTORED |= {name for name in SETTINGS if name.startswith("attack_")}


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, the usage in one line, and every flag's default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _format_usage(self, usage, actions, groups, prefix):
        """The arguments that are needed; the others are "[flags]"."""
        needed = [a for a in actions if a.required or not a.option_strings]
        return super()._format_usage(usage, needed, [], prefix).rstrip() + " [flags]\n\n"

    def _get_help_string(self, action):
        """The help of a flag with its default, unless it names that itself."""
        none = any(action.default is value for value in (None, False, "", argparse.SUPPRESS))
        plain = none or "default" in action.help
        return action.help if plain else f"{action.help}; default %(default)s"

    def _get_default_metavar_for_optional(self, action):
        """N for an integer, X for a real number; argparse's for others."""
        other = super()._get_default_metavar_for_optional(action)
        return {"int": "N", "float": "X"}.get(getattr(action.type, "__name__", ""), other)


class OneLineParser(argparse.ArgumentParser):
    """Reports an error in one line; underscores in flags are read as hyphens."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> None:
        """Print the error in one line; exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def parse_known_args(self, args=None, namespace=None):
        """argparse's, after `--use_vit` has become `--use-vit` (the course's spelling)."""
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), a) for a in args]
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """The parser of main.py's flags; its namespace holds the named settings only."""
    parser = OneLineParser(
        description="Train, evaluate or attack a scene classifier.",
        epilog=EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "data_folder", metavar="DATA_FOLDER", help="holds images/, train.txt and val.txt"
    )
    group = parser
    for setting in fields(RunConfig):
        if setting.name in GROUPS:
            group = parser.add_argument_group(GROUPS[setting.name])
        if setting.metadata:
            options = dict(setting.metadata)
            names = [spelled(setting.name), *options.pop("names")]
            names.sort(key=lambda name: name.startswith("--"))  # -b before --batch-size
            group.add_argument(*names, dest=setting.name, **options)
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
    if actions and bool(config.resume) == bool(config.weights):
        yield f"{actions[0]} looks at a checkpoint: name it by either --resume or --weights"
    if config.views and not config.evaluate:
        yield "--views needs -e"
    if config.views and config.cache == "device":
        yield "--views needs other images than --cache=device keeps: use --cache=ram"
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
    if config.recipe and not (config.use_scene_net or config.resume or config.weights):
        yield "--recipe is SceneNet's: add --use-scene-net"
    if config.use_mps and config.gpu is not None:
        yield "--use-mps and --gpu exclude each other"
    if config.resume and config.start_epoch:
        yield "--resume knows how many epochs are done: leave --start-epoch out"
    if config.start_epoch >= config.epochs:
        yield f"--start-epoch {config.start_epoch} leaves nothing of --epochs {config.epochs} to do"
    if actions:
        for flag in ("pgd", "at"):
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


def unit_remarks(config: RunConfig) -> Iterator[str]:
    """A line for each ε below one intensity level, which is probably meant for pixels in [0, 1]."""
    for name in ("at_eps", "attack_eps"):
        epsilon = getattr(config, name)
        if name in config.named and 0 < epsilon < 1:
            flag = spelled(name)
            yield (
                f"{flag}={epsilon:g} is {epsilon:g}/255; "
                f"{epsilon:g} of [0, 1] is {flag}={255 * epsilon:g}"
            )


def spelled(name: str) -> str:
    """A setting as its flag."""
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------------------------------------
# Defaults of a network, settings of a resumed run
# ---------------------------------------------------------------------------------------------


def resolve_defaults(config: RunConfig, kind: str) -> RunConfig:
    """`config` with the network's defaults for settings that the command line does not name.

    A resumed run, of which the other settings are restored, gets those that are None. --at turns
    CutMix off.
    """
    defaults = RECIPES[config.recipe or "gpu"] if kind == "scene_net" else DEFAULTS
    if config.at:
        defaults = defaults | {"cutmix": 0.0}
    known = SETTINGS.keys() if config.resume else config.named
    unset = {k: v for k, v in defaults.items() if k not in known or getattr(config, k) is None}
    return replace(config, **unset)


def restore(config: RunConfig, saved: dict) -> tuple[RunConfig, dict[str, tuple]]:
    """`config` with the saved settings that the command line does not name.

    Returns it with what the command line changes: {name: (old, new)}.

    Raises:
        UserError: a saved value is invalid, or contradicts a named one.
    """
    if config.recipe not in (None, recipe := saved.get("recipe") or "gpu"):
        raise UserError(f"the run has --recipe={recipe}, which cannot change: leave it out")
    restored, changed = {}, {}
    saved = AUGMENTATION | saved if saved else saved
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
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        parser = build_parser()
        parser.exit_on_error = False
        return getattr(parser.parse_args(["-", f"{spelled(name)}={value}"]), name)
    except (ValueError, argparse.ArgumentError, SystemExit):
        raise UserError(f"the checkpoint's setting {name} = {value!r:.40} is invalid") from None
