"""Train, evaluate or attack a scene classifier. Run from code/:

python main.py ../data --epochs=60                  train SimpleNet
python main.py ../data --resume=../logs/RUN         resume a run
python main.py ../data --resume=../logs/RUN -e -v   evaluate its best network
python main.py ../data --resume=../logs/RUN -a -v   attack its best network
tensorboard --logdir=../logs/RUN                    look at the curves and images
"""

from __future__ import annotations

import signal

INTERRUPT = signal.getsignal(signal.SIGINT)
if __name__ == "__main__":  # Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

# Read when torch starts. Waiting threads then sleep: by default they spin, and two runs on one
# machine take each other's cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from custom_dataloader import MiniPlacesLoader, count_classes
from deepvision import checkpoint
from deepvision.config import (
    SETTINGS,
    RunConfig,
    parse,
    resolve_defaults,
    restore,
    unit_remarks,
)
from deepvision.data import audit
from deepvision.data.augmentation import adapt_augmentation
from deepvision.data.cache import enable_caches
from deepvision.evaluation.evaluator import Evaluator
from deepvision.models import student
from deepvision.models.registry import (
    MODEL_REGISTRY,
    NETWORK_NAMES,
    create_model,
    load_network,
)
from deepvision.models.scene_net import SHAPES
from deepvision.runtime import distributed
from deepvision.runtime.console import script
from deepvision.runtime.device import (
    amp_problem,
    check_size,
    choose_device,
    compile_problem,
    configure_backend,
    prepare_model,
)
from deepvision.runtime.errors import exit_code
from deepvision.runtime.jsonl import read_json
from deepvision.runtime.run_dir import LOGS, latest_run, run_dir_of, run_launched_as
from deepvision.training.trainer import Resumed, Trainer
from utils import UserError, relpath


def main(argv: Sequence[str] | None = None, logs: Path = LOGS) -> int:
    """Run one command line; return the exit code. logs: where run folders are."""
    config = None
    try:
        require_torch()
        script, words = (sys.argv[0], sys.argv[1:]) if argv is None else ("main.py", argv)
        config = parse(words, script)
        if config.check_data:
            return audit.check(config.data_folder, config.workers)
        device = choose_device(config.device, flag="--use-mps" if config.use_mps else "--gpu")
        with distributed.process_group(device):
            execute = prepare(config, device, logs)
            code = execute()
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as e:
        return exit_code(e, *([config.memory_advice] if config else []))


def require_torch() -> None:
    """Raise UserError if torch is older than 2.6: its weights_only=True can be made to run code."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise UserError(f"torch {torch.__version__} is too old: install 2.6 or later")


def prepare(config: RunConfig, device: torch.device, logs: Path) -> Callable[[], int]:
    """Make everything that the command needs; return its last step, which returns the exit code."""
    for line in unit_remarks(config):
        print(line)
    num_classes = count_classes(config.data_folder)
    config, ckpt = find_checkpoint(config, logs)
    config, changed = restore_settings(config, ckpt, logs)
    resumes = config.resume and config.trains
    matmul = ckpt.get("float32_matmul", "highest") if resumes else None
    configure_backend(device, config.deterministic, config.trains, matmul)
    torch.manual_seed(config.seed)
    model, kind = make_network(config, ckpt, num_classes)
    config = drop_unusable(resolve_defaults(config, kind), kind, device)
    model, context = prepare_model(model, device, config.amp, config.compile)
    datasets = load_datasets(config, ckpt, num_classes)
    check_categories(ckpt, datasets[-1], config.weights or config.resume)
    if config.trains and config.augmentation:
        adapt_augmentation(datasets[0], **config.augmentation)
        for size in set(config.augmentation["sizes"]):
            check_size(model, context, size, "--resolution")
    epochs, strict = config.trains and config.epochs - config.start_epoch, "cache" in config.named
    cache = enable_caches(datasets, config.cache, config.workers, device, epochs, strict)
    config = replace(config, cache=cache)
    if not config.trains:
        return Evaluator(config, model, datasets[-1], context, logs).run
    resumed = Resumed(ckpt, config.resume, changed) if config.resume else None
    return Trainer(config, kind, model, datasets, context, logs, resumed).train


def find_checkpoint(config: RunConfig, logs: Path) -> tuple[RunConfig, dict]:
    """`config` with the path of its checkpoint in place of a run folder or auto; the checkpoint."""
    if config.resume == "auto" or distributed.was_restarted() and not config.resume:
        path = distributed.broadcast_from_main(lambda: latest_checkpoint(config, logs))
        config = replace(config, resume=path)
    if config.resume:
        name = checkpoint.LAST if config.trains else checkpoint.BEST
        config = replace(config, resume=str(checkpoint.locate(config.resume, name)))
    if config.weights:
        config = replace(config, weights=str(checkpoint.locate_weights(config.weights)))
    path = config.resume or config.weights
    if not config.trains:
        config = replace(config, resume=path)
    return config, checkpoint.load(path) if path else {}


def latest_checkpoint(config: RunConfig, logs: Path) -> str:
    """--resume=auto: the latest valid checkpoint of the newest run; '' where there is none.

    Processes that torchrun has restarted resume the run that they had started.

    Raises:
        UserError: there is none to evaluate or attack.
    """
    if config.resume == "auto":
        run = latest_run(logs, [config.network] if config.network else MODEL_REGISTRY)
    else:
        run = run_launched_as(logs, distributed.launch_id())
    path = run and checkpoint.latest_valid(run / "models")
    if path:
        return relpath(path)
    if not config.trains:
        raise UserError("--resume=auto: there is no run to look at")
    print(f"--resume=auto: {relpath(run or logs)} holds no checkpoint; starting a new run")
    return ""


def restore_settings(config: RunConfig, ckpt: dict, logs: Path) -> tuple[RunConfig, dict]:
    """`config` with the settings of the run that it resumes; {name: (old, new)} of what differs."""
    if not (config.resume and config.trains):
        return config, {}
    saved = ckpt.get("config")
    if not isinstance(saved, dict):
        run = run_dir_of(config.resume, logs)
        saved = read_json(run / "config.json").get("arguments") if run else None
    if not isinstance(saved, dict):
        print("The checkpoint has no settings: flags that are not given have their defaults.")
        saved = {}
    config, changed = restore(config, saved)
    for name, (old, new) in changed.items():
        print(f"Changed for this run: {name} from {old} to {new}.")
    return config, changed


def drop_unusable(config: RunConfig, kind: str, device: torch.device) -> RunConfig:
    """`config` without restored settings of the machine that this one cannot do, with a line each.

    Raises:
        UserError: the command line names such a setting.
    """
    problems = {
        "amp": amp_problem(config.amp, device),
        "compile": config.compile and compile_problem(kind, device),
    }
    for name, problem in problems.items():
        if not problem:
            continue
        if name in config.named:
            raise UserError(problem)
        print(f"{problem}; this run continues without it.")
        config = replace(config, **{name: SETTINGS[name]})
    return config


def make_network(config: RunConfig, ckpt: dict, num_classes: int) -> tuple[torch.nn.Module, str]:
    """The network of the command line or of the checkpoint, and its kind."""
    if not ckpt:
        kind, shape = config.network or "torch_conv", SHAPES[config.recipe or "gpu"]
        return create_model(kind, num_classes, pretrained=True, shape=shape), kind
    path = config.resume or config.weights
    model, kind = load_network(ckpt, path, num_classes, config.network)
    print(f"Loaded {path}: {NETWORK_NAMES[kind]}, epochs done: {ckpt.get('epoch', '?')}.")
    return model, kind


def load_datasets(config: RunConfig, ckpt: dict, num_classes: int) -> list[MiniPlacesLoader]:
    """The training set, if the run trains, and the validation set, without skipped images.

    A resumed run skips the same images as before, so that its batches stay the same.
    """
    transforms = {"train": student.train_transforms()} if config.trains else {}
    transforms["val"] = student.val_transforms()
    datasets = [
        MiniPlacesLoader(config.data_folder, None, num_classes, split, transform)
        for split, transform in transforms.items()
    ]
    names = checkpoint.skipped_images(ckpt) if config.resume and config.trains else None
    if config.skip_bad_images and not names:
        print("Reading every image once, to find those that cannot be read")
        names = audit.unreadable(datasets, config.workers)
    for dataset in datasets:
        dataset.skip(names or [])
        for name in dataset.skipped:
            print(f"skipped: {name}")
    if names:
        print(f"{len(names)} images are skipped.")
    return datasets


def check_categories(ckpt: dict, dataset: MiniPlacesLoader, path: str) -> None:
    """Raise UserError if the file records other categories than the data folder has."""
    theirs, own = ckpt.get("categories"), list(dataset.get_index_mapping().values())
    if theirs is not None and theirs != own:
        raise UserError(
            f"{path} was trained on other categories than those of {dataset.root_folder}"
        )


if __name__ == "__main__":
    with script(INTERRUPT):
        sys.exit(main())
