"""How fast an attack steps on the CPU: as students write it in the course, and ours.

    python benchmarks/pgd.py
    python benchmarks/pgd.py --batch-size 16 --attack-steps 3 --rounds 7

The course's: a backward pass to input and weights at every step, the label picked anew each time,
images as they come. Ours: Part III's `PGDAttack` and the general `attacks.PGD`, on the network as
the driver lays it out. Same number of steps, on noise. Writes results/pgd_benchmark.{json,md}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))

from side_by_side import Ways, Work, measure, options, write  # noqa: E402
from train_step import NETWORKS, as_in_the_course  # noqa: E402

from deepvision.attacks import PGD  # noqa: E402
from deepvision.training.engine import DeviceContext  # noqa: E402
from student_code import PGDAttack  # noqa: E402

EPSILON, STEP_SIZE = 0.1, 0.01
Perturb = Callable[[nn.Module, Tensor], Tensor]


def course_attack(model: nn.Module, x: Tensor, steps: int) -> Work:
    criterion = nn.CrossEntropyLoss()

    def work() -> None:
        adversarial = x.clone()
        for _ in range(steps):
            adversarial = adversarial.detach().requires_grad_(True)
            logits = model(adversarial)
            model.zero_grad()
            criterion(logits, logits.argmin(1)).backward()
            adversarial = adversarial - STEP_SIZE * adversarial.grad.sign()
            adversarial = torch.max(torch.min(adversarial, x + EPSILON), x - EPSILON)

    return work


def our_attack(model: nn.Module, x: Tensor, perturb: Perturb) -> Work:
    place = DeviceContext(torch.device("cpu"))
    place.prepare_model(model)
    laid_out = place.to_device_images(x)
    return lambda: perturb(model, laid_out)


def ways(name: str, args: argparse.Namespace) -> Ways:
    torch.manual_seed(0)
    model = NETWORKS[name](num_classes=100).eval()
    x, y = torch.randn(args.batch_size, 3, 128, 128), torch.zeros(args.batch_size).long()
    part3 = PGDAttack(nn.CrossEntropyLoss(), args.attack_steps, STEP_SIZE, EPSILON)
    general = PGD(epsilon=EPSILON, steps=args.attack_steps)
    return {
        "course's way": lambda: course_attack(as_in_the_course(model), x, args.attack_steps),
        "ours, Part III": lambda: our_attack(model, x, part3.perturb),
        "ours, attacks.PGD": lambda: our_attack(model, x, partial(general.perturb, y=y)),
    }


def main() -> None:
    parser = options("Measure attack steps on one core.", batch_size=16)
    parser.add_argument("--attack-steps", type=int, default=3)
    args = parser.parse_args()
    images = args.batch_size * args.attack_steps
    rows = measure(NETWORKS, lambda name: ways(name, args), args.rounds, images)
    note = "Per image and attack step. Medians of interleaved rounds, one thread."
    write("pgd_benchmark", "PGD: the course's way beside ours", note, rows)


if __name__ == "__main__":
    main()
