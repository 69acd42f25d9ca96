"""Train, evaluate or attack a scene classifier. Run from code/:

python main.py ../data --epochs=60                                                train
python main.py ../data --epochs=60 --resume=../logs/RUN/models/checkpoint.pth.tar go on
python main.py ../data --resume=../logs/RUN/models/model_best.pth.tar -e -v       evaluate
python main.py ../data --resume=../logs/RUN/models/model_best.pth.tar -a -v       attack
tensorboard --logdir=../logs/RUN                                                  look
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from argparse import Namespace

import torch
from torch import nn

import student_code
from custom_dataloader import MiniPlacesLoader, count_classes
from deepvision import checkpoint, config
from deepvision.data import audit, cache
from deepvision.data.loader import worker_death
from deepvision.evaluation.evaluator import Evaluator
from deepvision.models import registry
from deepvision.runtime import distributed, run_logger
from deepvision.training import optim
from deepvision.training.engine import DeviceContext
from deepvision.training.trainer import Trainer
from utils import UserError, relpath

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(gpu: int | None, use_mps: bool) -> torch.device:
    """The one place that asks which devices there are."""
    if use_mps:
        if not torch.backends.mps.is_available():
            raise UserError("--use-mps: PyTorch finds no Apple GPU here; leave the flag out")
        return torch.device("mps")
    if gpu == -1:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if gpu:
            raise UserError(f"--gpu {gpu}: PyTorch finds no CUDA GPU here; --gpu=-1 is the CPU")
        print("No CUDA device found: running on the CPU.")
        return torch.device("cpu")
    gpu = distributed.local_rank() if gpu is None else gpu
    if gpu >= torch.cuda.device_count():
        raise UserError(f"--gpu {gpu}: this machine has GPUs 0 to {torch.cuda.device_count() - 1}")
    torch.cuda.set_device(gpu)  # where NCCL would otherwise take the first
    return torch.device("cuda", gpu)


def make_network(args: Namespace, num_classes: int) -> tuple[str, nn.Module, dict]:
    """The kind of network, the network, and the checkpoint that the run resumes from (or {})."""
    path = args.resume or args.weights
    if not path:
        kind = args.kind or "torch_conv"
        return kind, registry.create_model(kind, num_classes, pretrained=True), {}
    content = checkpoint.load(path)
    kind = args.kind or content.get("kind")
    if not isinstance(kind, str) or kind not in registry.MODEL_REGISTRY:
        kind = registry.infer_arch(content["state_dict"], num_classes)
    model = registry.create_model(kind, num_classes)
    checkpoint.load_weights(model, content, path)
    print(f"Loaded {path}: {kind}, epochs done: {content.get('epoch', '?')}.")
    return kind, model, content if args.resume else {}


def find_checkpoint(args: Namespace) -> str:
    """--resume=auto: the newest good checkpoint of the newest run, '' where there is none.

    Processes that torchrun restarts look at the run that they had begun.

    Raises:
        UserError: there is none to evaluate or attack.
    """
    if args.resume == "auto":
        folder = run_logger.latest_run([args.kind] if args.kind else registry.MODEL_REGISTRY)
    else:
        folder = run_logger.run_launched_as(distributed.launch_id())
    path = folder and checkpoint.latest_valid(folder / "models")
    if path:
        return relpath(path)
    if args.evaluate or args.attack:
        raise UserError("--resume=auto: there is no run to look at")
    place = relpath(folder or run_logger.LOGS)
    print(f"--resume=auto: {place} holds no checkpoint; starting afresh")
    return ""


def leave_out_bad_images(args: Namespace, content: dict, datasets: list[MiniPlacesLoader]) -> None:
    """--skip-bad-images; a resumed run leaves out what it always did, so that it stays the same."""
    names = None if args.evaluate or args.attack else checkpoint.skipped_images(content)
    if args.skip_bad_images and not names:
        print("Reading every image once, to leave out the bad ones")
        names = audit.unreadable(datasets, args.workers)
    for dataset in datasets:
        dataset.skip(names or [])
        for name in dataset.left_out:
            print(f"left out: {name}")
    if names:
        print(f"{len(names)} images are left out.")


def run(args: Namespace) -> int:
    if args.check_data:
        return audit.check(args.data_folder, args.workers)
    device = choose_device(args.gpu, args.use_mps)
    with distributed.process_group(device):
        return run_on(device, args)


def run_on(device: torch.device, args: Namespace) -> int:
    place = DeviceContext(device, AMP[args.amp])
    if args.amp == "fp16" and place.device.type == "cpu":
        raise UserError("--amp=fp16 takes a CPU twenty times as long: use --amp=bf16")
    if args.deterministic:
        make_deterministic()
    num_classes = count_classes(args.data_folder)
    torch.manual_seed(args.seed)
    if args.resume == "auto" or distributed.was_restarted() and not args.resume:
        args.resume = distributed.broadcast_from_main(lambda: find_checkpoint(args))
    kind, model, content = make_network(args, num_classes)
    optim.resolve_defaults(args, kind)
    model = place.prepare_model(model, args.compile)
    only_look = args.evaluate or args.attack
    transforms = {"val": student_code.get_val_transforms()}
    if not only_look:
        transforms["train"] = student_code.get_train_transforms()
    sets = {
        split: MiniPlacesLoader(args.data_folder, None, num_classes, split, transform)
        for split, transform in transforms.items()
    }
    leave_out_bad_images(args, content, list(sets.values()))
    for dataset in sets.values():
        cache.enable_cache(dataset, args.cache, args.workers, place.device)
    if only_look:
        return Evaluator(args, model, sets["val"], place).run()
    return Trainer(args, kind, model, content, sets["train"], sets["val"], place).train()


def make_deterministic() -> None:
    """--deterministic: the same bits from every run on the same GPU, some operations slower."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS needs for it, NVIDIA's manual
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def main(argv: list[str] | None = None) -> int:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        print(f"error: torch {torch.__version__} is too old: install 2.6 or later", file=sys.stderr)
        return 1
    try:
        code = run(config.parse(argv))
        sys.stdout.flush()
        return code
    except UserError as e:
        return refuse(e)
    except torch.OutOfMemoryError:
        return refuse(UserError("the GPU's memory is too small for this: use a smaller -b"))
    except RuntimeError as e:
        if (death := worker_death(e)) is None:
            raise
        return refuse(death)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or Python fails to write it at its end
        place = e.filename or "the output"
        return refuse(UserError(f"cannot write {place}: {e.strerror}; what was saved is whole"))
    except KeyboardInterrupt:
        print("Stopped at once; what was saved is whole.", file=sys.stderr)
        return 130


def refuse(error: UserError) -> int:
    if hasattr(signal, "SIGCHLD"):  # torch would raise again at each worker that ends from here on
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
