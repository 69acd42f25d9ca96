"""Measure attack steps on the CPU: a PGD loop as in the course, and this project's attacks.

    python benchmarks/pgd.py
    python benchmarks/pgd.py --batch-size 16 --attack-steps 3 --rounds 7

The course loop computes the gradients of input and weights at every step, chooses the target again
at every step, and keeps the NCHW layout. Ours: `PGDAttack` (Part III) and `attacks.pgd.PGD`, with
the network prepared as main.py does. All take the same number of steps, on Gaussian noise. Writes
results/pgd_benchmark.{json,md}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from side_by_side import TIMES, Variants, Work, make_parser, measure, write
from torch import Tensor, nn
from train_step import NETWORKS, course_blocks

from deepvision.attacks import PGD
from deepvision.runtime.device import configure_backend, prepare_model
from deepvision.runtime.provenance import command_line
from student_code import PGDAttack

EPSILON, STEP_SIZE = 0.1, 0.01  # normalised units
CPU = torch.device("cpu")


def course_attack(model: nn.Module, x: Tensor, steps: int) -> Work:
    """Targeted PGD on x (N, C, H, W), as students write it in the course."""
    criterion = nn.CrossEntropyLoss()

    def work() -> None:
        x_adv = x.clone()
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_(True)
            logits = model(x_adv)
            model.zero_grad()
            criterion(logits, logits.argmin(1)).backward()
            x_adv = x_adv - STEP_SIZE * x_adv.grad.sign()
            x_adv = torch.max(torch.min(x_adv, x + EPSILON), x - EPSILON)

    return work


def our_attack(model: nn.Module, x: Tensor, perturb: Callable[[nn.Module, Tensor], Tensor]) -> Work:
    """`perturb` on x (N, C, H, W), with backend, network and layout as in main.py."""
    configure_backend(CPU)
    model, context = prepare_model(model, CPU)
    x, _ = context.to_device(x, torch.empty(0))
    return lambda: perturb(model, x)


def variants(name: str, args: argparse.Namespace) -> Variants:
    """The three attacks on one network."""
    torch.manual_seed(0)
    model = NETWORKS[name](num_classes=100).eval()
    x, y = torch.randn(args.batch_size, 3, 128, 128), torch.zeros(args.batch_size).long()
    part3 = PGDAttack(nn.CrossEntropyLoss(), args.attack_steps, STEP_SIZE, EPSILON)
    general = PGD(epsilon=EPSILON, steps=args.attack_steps)
    return {
        "course loop": lambda: course_attack(course_blocks(model), x, args.attack_steps),
        "ours, Part III": lambda: our_attack(model, x, part3.perturb),
        "ours, attacks.pgd.PGD": lambda: our_attack(model, x, partial(general.perturb, y=y)),
    }


def main(argv: Sequence[str]) -> None:
    """Measure and write the results."""
    parser = make_parser(__doc__, batch_size=16)
    parser.add_argument("--attack-steps", type=int, default=3, help="steps of each attack")
    args = parser.parse_args(argv[1:])
    images = args.batch_size * args.attack_steps
    rows = measure(NETWORKS, lambda name: variants(name, args), args.rounds, images)
    note = f"Per image and attack step. {TIMES}"
    write("pgd_benchmark", "PGD: course loop and ours", note, rows, command_line(argv))


if __name__ == "__main__":
    main(sys.argv)
