"""Train, evaluate or attack a scene classifier. Run from code/:

python main.py ../data --epochs=60                                                train
python main.py ../data --epochs=60 --resume=../logs/RUN/models/checkpoint.pth.tar go on
python main.py ../data --resume=../logs/RUN/models/model_best.pth.tar -e -v       evaluate
python main.py ../data --resume=../logs/RUN/models/model_best.pth.tar -a -v       attack
tensorboard --logdir=../logs/RUN                                                  look
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from argparse import Namespace

import torch
from torch import Tensor, nn

import arguments
import checkpoint
import data_audit
import engine
import image_cache
import logbook
import networks
import student_code
from custom_dataloader import (
    MiniPlacesLoader,
    count_classes,
    validation_batches,
    worker_death,
)
from custom_transforms import IMAGENET_MEAN, IMAGENET_STD
from engine import Clock, Place, Scores, Tally
from logbook import Console, Logbook, final_line
from trainer import Trainer
from utils import UserError

DIFFERENCE_FACTOR = 10


def choose_device(gpu: int, use_mps: bool) -> torch.device:
    """The one place that asks which devices there are."""
    if use_mps:
        if not torch.backends.mps.is_available():
            raise UserError("--use-mps: PyTorch finds no Apple GPU here; leave the flag out")
        return torch.device("mps")
    if gpu == -1:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if gpu > 0:
            raise UserError(f"--gpu {gpu}: PyTorch finds no CUDA GPU here; --gpu=-1 is the CPU")
        print("No CUDA device found: running on the CPU.")
        return torch.device("cpu")
    if gpu >= torch.cuda.device_count():
        raise UserError(f"--gpu {gpu}: this machine has GPUs 0 to {torch.cuda.device_count() - 1}")
    return torch.device("cuda", gpu)


def make_network(args: Namespace, num_classes: int) -> tuple[str, nn.Module, dict]:
    """The kind of network, the network, and the checkpoint it was loaded from (or {})."""
    if not args.resume:
        kind = args.kind or "torch_conv"
        return kind, networks.build(kind, num_classes, pretrained=True), {}
    content = checkpoint.load(args.resume)
    kind = args.kind or content.get("kind")
    if not isinstance(kind, str) or kind not in networks.BUILDERS:
        kind = networks.kind_of(content["state_dict"], num_classes)
    model = networks.build(kind, num_classes)
    checkpoint.load_weights(model, content, args.resume)
    print(f"Loaded {args.resume}: {kind} after {content.get('epoch', '?')} epochs.")
    return kind, model, content


def pictures_of(args: Namespace) -> contextlib.AbstractContextManager[Logbook | None]:
    """With -v, the logbook of the run that the checkpoint belongs to."""
    if not args.vis:
        return contextlib.nullcontext()
    folder = logbook.run_of(args.resume) or logbook.new_run("evaluation")
    print(f"Pictures: tensorboard --logdir={os.path.relpath(folder)}")
    return Logbook(folder)


def evaluate(args: Namespace, model: nn.Module, batches, place: Place) -> None:
    """-e: accuracy without and with mirror averaging."""
    plain, mirrored, clock = Tally(place.device), Tally(place.device), Clock()
    with pictures_of(args) as book, Console(len(batches), args.print_freq) as console:
        passes = engine.evaluate(model, batches, place, plain, clock, mirrored)
        for i, x in enumerate(passes):
            if console.step(i):
                console.test_line(i, clock, *mirrored.read())
                if book:
                    book.picture("Image/Image", student_code.default_visfunction(x), i)
    conclude(
        args,
        plain=("Each image by itself:", plain.read()[1]),
        mirrored=("Averaged with its mirror image:", mirrored.read()[1]),
    )


def attack(args: Namespace, model: nn.Module, batches, place: Place) -> None:
    """-a: accuracy before and after the default attack, on the same images."""
    attacker = student_code.default_attack(nn.CrossEntropyLoss())
    clean, adversarial, clock = Tally(place.device), Tally(place.device), Clock()
    with pictures_of(args) as book, Console(len(batches), args.print_freq) as console:
        passes = engine.attack(model, batches, attacker, place, clean, adversarial, clock)
        for i, (x, x_adv) in enumerate(passes):
            if console.step(i):
                console.test_line(i, clock, *adversarial.read())
                if book:
                    show_attack(book, x, x_adv, i)
    conclude(
        args,
        clean=("Clean images:", clean.read()[1]),
        attacked=(f"Attacked images{budget_of(attacker)}:", adversarial.read()[1]),
    )


def conclude(args: Namespace, **findings: tuple[str, Scores]) -> None:
    """Print each finding, the one that counts last, and keep them all beside the run."""
    row = {"checkpoint": os.path.basename(args.resume)}
    for name, (title, scores) in findings.items():
        print(title, final_line(scores), sep="\n")
        row |= {f"{name}_top1": scores.acc1, f"{name}_top5": scores.acc5}
    if folder := logbook.run_of(args.resume):
        logbook.add_evaluation(folder, **row)


def budget_of(attacker: object) -> str:
    """The attack's ε in both units, if it tells its own."""
    epsilon = getattr(attacker, "epsilon", None)
    if epsilon is None:
        return ""
    levels = ", ".join(f"{255 * epsilon * s:.2f}" for s in IMAGENET_STD)
    return f", ε = {epsilon:g} normalised = ({levels})/255 in R, G, B"


def show_attack(book: Logbook, x: Tensor, x_adv: Tensor, step: int) -> None:
    """Pictures before and after, and their difference amplified around mid-grey."""
    mean, std = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    difference = 0.5 + DIFFERENCE_FACTOR * (x_adv - x) * std  # in pixels of [0, 1]
    pictures = {
        "Image/Org_Image": x,
        "Image/Adv_Image": x_adv,
        f"Image/Difference_x{DIFFERENCE_FACTOR}": (difference.clamp(0, 1) - mean) / std,
    }
    for tag, batch in pictures.items():
        book.picture(tag, student_code.default_visfunction(batch), step)


def find_checkpoint(args: Namespace) -> str:
    """--resume=auto: the newest good checkpoint of the newest run, '' where there is none.

    Raises:
        UserError: there is none to evaluate or attack.
    """
    folder = logbook.newest_run([args.kind] if args.kind else networks.BUILDERS)
    path = folder and checkpoint.newest_good(folder / "models")
    if path:
        return os.path.relpath(path)
    if args.evaluate or args.attack:
        raise UserError("--resume=auto: there is no run to look at")
    place = os.path.relpath(folder or logbook.LOGS)
    print(f"--resume=auto: {place} holds no checkpoint; starting afresh")
    return ""


def leave_out_bad_images(args: Namespace, content: dict, datasets: list[MiniPlacesLoader]) -> None:
    """--skip-bad-images; a resumed run leaves out what it always did, so that it stays the same."""
    names = None if args.evaluate or args.attack else checkpoint.left_out(content)
    if names is None and args.skip_bad_images:
        print("Reading every image once, to leave out the bad ones")
        names = data_audit.unreadable(datasets, args.workers)
    for dataset in datasets:
        dataset.leave_out(names or [])
        for name in dataset.left_out:
            print(f"left out: {name}")
    if names:
        print(f"{len(names)} images are left out.")


def run(args: Namespace) -> int:
    if args.check_data:
        return data_audit.check(args.data_folder, args.workers)
    place = Place(choose_device(args.gpu, args.use_mps))
    if args.deterministic:
        make_deterministic()
    num_classes = count_classes(args.data_folder)
    torch.manual_seed(args.seed)
    if args.resume == "auto":
        args.resume = find_checkpoint(args)
    kind, model, content = make_network(args, num_classes)
    model = model.to(place.device, memory_format=place.memory_format)
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
        image_cache.keep(dataset, args.cache, args.workers, place.device)
    if only_look:
        batches = validation_batches(sets["val"], args.workers, place.device.type == "cuda")
        (evaluate if args.evaluate else attack)(args, model, batches, place)
        return 0
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
        return run(arguments.parse(argv))
    except UserError as e:
        return refuse(e)
    except torch.OutOfMemoryError:
        return refuse(UserError("the GPU's memory is too small for this: use a smaller -b"))
    except RuntimeError as e:
        if (death := worker_death(e)) is None:
            raise
        return refuse(death)
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
