"""Measure the cost of a training step in each mode of adversarial training.

    python benchmarks/adversarial_cost.py [--batch-size 32] [--rounds 5]

SimpleNet on 128 x 128 images, in main.py's engine. CPU seconds of this process, the median over
rounds in which the modes alternate. Writes a section of results/robustness.md.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from results_file import origin, origin_line, write_section
from small_images import SCALE

from deepvision.config import OneLineParser
from deepvision.runtime.device import DeviceContext
from deepvision.runtime.meters import EpochMetrics, StepTimer
from deepvision.runtime.provenance import command_line
from deepvision.training.engine import train_epoch
from deepvision.training.objectives import STEPS, AdversarialTraining, Objective, Standard
from student_code import SimpleNet
from utils import LinearWarmupCosineAnnealingLR


def make_step(batch_size: int) -> Callable[[Objective], float]:
    """A function that takes one training step with an objective and returns its CPU seconds."""
    context = DeviceContext(torch.device("cpu"))
    model = SimpleNet(num_classes=10).to(memory_format=context.memory_format)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scheduler = LinearWarmupCosineAnnealingLR(optimizer, 0, 10**6)
    batch = torch.randn(batch_size, 3, 128, 128), torch.randint(10, (batch_size,))

    def step(objective: Objective) -> float:
        metrics, timer, start = EpochMetrics(context.device), StepTimer(), time.process_time()
        train_epoch(
            model, [batch], objective, optimizer, scheduler, context, metrics, timer, seed=0
        )
        return time.process_time() - start

    return step


def measure(batch_size: int, rounds: int) -> dict[str, float]:
    """The median CPU seconds of a step, by mode; "standard" comes first."""
    step = make_step(batch_size)
    modes: dict[str, Objective] = {"standard": Standard()}
    for mode, steps in STEPS.items():
        modes[mode] = AdversarialTraining(mode=mode, steps=steps, scale=SCALE)
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(rounds + 1):
        for mode, objective in modes.items():
            seconds[mode].append(step(objective))
    return {
        mode: statistics.median(values[1:]) for mode, values in seconds.items()
    }  # after warm-up


def main(argv: Sequence[str]) -> None:
    """Measure and write the section."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=32, help="images per step")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all modes")
    args = parser.parse_args(argv[1:])
    torch.manual_seed(0)
    seconds = measure(args.batch_size, args.rounds)
    lines = ["| mode | attack steps | CPU s | / standard |", "|---|---:|---:|---:|"]
    for mode, value in seconds.items():
        ratio = value / seconds["standard"]
        lines.append(f"| {mode} | {STEPS.get(mode, '')} | {value:.3f} | {ratio:.2f} |")
    print("\n".join(lines))
    text = "\n".join([*lines, "", origin_line(origin(command_line(argv)))])
    write_section("robustness.md", "Cost of a step of adversarial training", text)


if __name__ == "__main__":
    main(sys.argv)
