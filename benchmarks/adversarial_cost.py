"""What a step of each mode of adversarial training costs, beside a step of ordinary training:

    python benchmarks/adversarial_cost.py [--batch-size 32] [--rounds 5]

SimpleNet on 128 x 128 images, the engine's own loop; CPU seconds of this process, the median over
rounds that take the modes in turn. Writes a section of results/robustness.md.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from results_file import provenance, write_section
from small_images import PIXELS
from torch import nn

from deepvision.training import engine
from deepvision.training.engine import DeviceContext, EpochMetrics, StepTimer
from deepvision.training.objectives import STEPS, AdversarialTraining, standard
from student_code import SimpleNet
from utils import LinearWarmupCosineAnnealingLR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    place = DeviceContext(torch.device("cpu"))
    model = SimpleNet(num_classes=10).to(memory_format=place.memory_format)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scheduler = LinearWarmupCosineAnnealingLR(optimizer, 0, 10**6)
    batch = torch.randn(args.batch_size, 3, 128, 128), torch.randint(10, (args.batch_size,))

    def step(objective) -> float:
        parts = (model, [batch], nn.CrossEntropyLoss(), optimizer, scheduler, place)
        start = time.process_time()
        for _ in engine.train_epoch(
            *parts, EpochMetrics(place.device), StepTimer(), seed=0, objective=objective
        ):
            pass
        return time.process_time() - start

    modes = {"ordinary": standard}
    for mode, steps in STEPS.items():
        modes[mode] = AdversarialTraining(mode=mode, steps=steps, pixels=PIXELS)
    seconds = {name: [] for name in modes}
    for i in range(args.rounds + 1):
        for name, objective in modes.items():
            taken = step(objective)
            if i:  # the first round warms up
                seconds[name].append(taken)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    lines = ["| mode | steps of the attack | CPU s | times ordinary |", "|---|---:|---:|---:|"]
    for name, taken in median.items():
        times = f"{taken / median['ordinary']:.2f}"
        lines.append(f"| {name} | {STEPS.get(name, '')} | {taken:.3f} | {times} |")
    print("\n".join(lines))
    text = "\n".join([*lines, "", provenance()])
    write_section("robustness.md", "Cost of a step of adversarial training", text)


if __name__ == "__main__":
    main()
