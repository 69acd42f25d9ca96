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
import sys
from argparse import Namespace

import torch
from torch import Tensor, nn

import arguments
import checkpoint
import engine
import logbook
import networks
import student_code
from custom_dataloader import MiniPlacesLoader, count_classes, validation_batches
from custom_transforms import IMAGENET_MEAN, IMAGENET_STD
from engine import Clock, Place, Tally
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
    if kind not in networks.BUILDERS:
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
    print("Each image by itself:", final_line(plain.read()[1]), sep="\n")
    print("Averaged with its mirror image:", final_line(mirrored.read()[1]), sep="\n")


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
    print("Clean images:", final_line(clean.read()[1]), sep="\n")
    print(f"Attacked images{budget_of(attacker)}:", final_line(adversarial.read()[1]), sep="\n")


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


def run(args: Namespace) -> int:
    place = Place(choose_device(args.gpu, args.use_mps))
    num_classes = count_classes(args.data_folder)
    torch.manual_seed(args.seed)
    kind, model, content = make_network(args, num_classes)
    model = model.to(place.device, memory_format=place.memory_format)
    val_set = MiniPlacesLoader(
        args.data_folder, None, num_classes, "val", student_code.get_val_transforms()
    )
    if args.evaluate or args.attack:
        batches = validation_batches(val_set, args.workers, place.device.type == "cuda")
        (evaluate if args.evaluate else attack)(args, model, batches, place)
        return 0
    train_set = MiniPlacesLoader(
        args.data_folder, None, num_classes, "train", student_code.get_train_transforms()
    )
    return Trainer(args, kind, model, content, train_set, val_set, place).train()


def main(argv: list[str] | None = None) -> int:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        print(f"error: torch {torch.__version__} is too old: install 2.6 or later", file=sys.stderr)
        return 1
    try:
        return run(arguments.parse(argv))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
