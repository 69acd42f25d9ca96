"""Our convolution beside torch's: time, memory, bytes saved for backward, error.

    python benchmarks/conv.py              # the CPU, one thread and two: some minutes
    python benchmarks/conv.py --quick      # fewer rounds and shapes
    python benchmarks/conv.py --gpu 0      # CUDA: float32, TF32 and bfloat16 at batch 256

The ways take turns within each round, and a ratio is the median of the rounds' ratios. On one
CPU thread the time is CPU time, so that other work on the machine counts little. Writes
results/conv_benchmark.{json,md,png}, on CUDA results/conv_benchmark_cuda.{json,md,png}.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))

from conv_report import COURSE, OURS, OURS_NCHW, TORCH, TORCH_LAST, UNFOLD, write  # noqa: E402
from results_file import circumstances, processor  # noqa: E402

from deepvision.training.engine import device_name  # noqa: E402
from student_code import CustomConv2d, SimpleNet  # noqa: E402


class UnfoldConv2d(nn.Conv2d):
    """The usual answer: unfold the whole batch, multiply, and let autograd save the columns."""

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride)
        y = self.weight.flatten(1) @ columns + self.bias[:, None]
        sides = [(s + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1
                 for s in x.shape[2:]]  # fmt: skip
        return y.view(len(x), -1, *sides)


# name -> (the layer, memory format); each is compared with the first
WAYS = {
    TORCH: (nn.Conv2d, torch.contiguous_format),
    TORCH_LAST: (nn.Conv2d, torch.channels_last),
    UNFOLD: (UnfoldConv2d, torch.contiguous_format),
    OURS_NCHW: (CustomConv2d, torch.contiguous_format),
    OURS: (CustomConv2d, torch.channels_last),
}

# (C_i, C_o, K, S, P, H): SimpleNet's layers on 128 x 128 images, then others at a smaller batch
SIMPLENET = [(3, 64, 7, 2, 3, 128), (64, 64, 1, 1, 0, 32), (64, 64, 3, 1, 1, 32)]
SIMPLENET += [(64, 256, 1, 1, 0, 32), (256, 128, 1, 1, 0, 16), (128, 128, 3, 1, 1, 16)]
SIMPLENET += [(128, 512, 1, 1, 0, 16)]
SWEEP = [(3, 32, 3, 1, 1, 64), (16, 16, 3, 1, 1, 64), (64, 64, 3, 2, 1, 64), (64, 64, 5, 1, 2, 32)]
SWEEP += [(64, 128, 1, 2, 0, 32), (256, 256, 3, 1, 1, 8), (512, 512, 3, 1, 1, 4)]
SWEEP += [(3, 96, 11, 4, 2, 128), (3, 192, 16, 16, 0, 128), (32, 8, 3, 1, 1, 65)]


class Meter:
    """Time and peak memory of a call on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, call: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        one_thread = self.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if one_thread else time.perf_counter
        start = clock()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """What the call takes beyond what was there before; None where nothing tells (no Linux)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return torch.cuda.max_memory_allocated() - before
        status = Path("/proc/self/status")
        if not status.exists():
            return None
        ctypes.CDLL(None).malloc_trim(0)  # what Python freed is given back first
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident(status)["VmRSS"]
        call()
        return resident(status)["VmHWM"] - before


def resident(status: Path) -> dict[str, int]:
    found = re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status.read_text(), re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in found}


def saved_bytes(forward: Callable[[], object]) -> int:
    """The bytes that a forward pass keeps for backward."""
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(sizes)


def compare(meter: Meter, calls: dict[str, Callable], rounds: int, base: str) -> dict[str, dict]:
    """One row a way: median milliseconds, and the median of its ratios to the base's rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            spent = meter.seconds(call)
            if i > 0:  # the first round is warm-up
                seconds[name].append(spent)
    return {
        name: {
            "ms": round(1e3 * statistics.median(spent), 3),
            "ratio": ratio(spent, seconds[base]),
        }
        for name, spent in seconds.items()
    }


def ratio(spent: list[float], base: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(spent, base, strict=True)), 3)


# ---------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------


def outcome(layer: nn.Module, x: Tensor, G: Tensor) -> list[Tensor]:
    """The output, and the gradients of the parameters and of x if it wants one."""
    y = layer(x)
    wanting = [*layer.parameters(), *([x] if x.requires_grad else [])]
    return [y, *torch.autograd.grad(y, wanting, G)]


def measure_layer(meter: Meter, shape: tuple[int, ...], batch: int, rounds: int) -> dict:
    """Forward and backward of one layer, all ways with the same weights and images."""
    C_i, C_o, K, S, P, H = shape
    wants = shape != SIMPLENET[0]  # images want no gradient
    calls, forwards = {}, {}
    for name, (kind, layout) in WAYS.items():
        torch.manual_seed(0)
        layer = kind(C_i, C_o, K, S, P).to(meter.device, memory_format=layout)
        x = torch.randn(batch, C_i, H, H).to(meter.device, memory_format=layout)
        G = torch.randn(layer(x).shape).to(meter.device, memory_format=layout)
        calls[name] = functools.partial(outcome, layer, x.requires_grad_(wants), G)
        forwards[name] = functools.partial(layer, x)
        if name == TORCH:
            double = copy.deepcopy(layer).double(), x.detach().double(), G.double()
            exact = outcome(double[0], double[1].requires_grad_(wants), double[2])
    rows = compare(meter, calls, rounds, TORCH)
    for name, row in rows.items():
        row["saved_bytes"] = saved_bytes(forwards[name])
        row["error"] = max(map(relative_error, calls[name](), exact))
    names = ("C_i", "C_o", "K", "S", "P", "H")
    return {"shape": dict(zip(names, shape, strict=True)), "N": batch, "ways": rows}


def relative_error(a: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest number."""
    return ((a.double() - exact).abs().max() / exact.abs().max()).item()


def networks(device: torch.device) -> dict[str, nn.Module]:
    nets = {}
    for name, (kind, layout) in WAYS.items():
        torch.manual_seed(0)
        nets[name] = SimpleNet(kind).to(device, memory_format=layout)
    return nets


def measure_training(meter: Meter, batch: int, rounds: int, autocast: Callable) -> dict:
    """A training step of SimpleNet: forward, backward, SGD."""
    images, labels = batch_of(batch, meter.device)
    steps, forwards = {}, {}
    for name, net in networks(meter.device).items():
        x = images.contiguous(memory_format=WAYS[name][1])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

        def forward(net=net, x=x) -> Tensor:
            with autocast():
                return F.cross_entropy(net(x), labels)

        def step(optimizer=optimizer, forward=forward) -> None:
            optimizer.zero_grad()
            forward().backward()
            optimizer.step()

        steps[name], forwards[name] = step, forward
    rows = compare(meter, steps, rounds, TORCH)
    for name, row in rows.items():
        row["saved_bytes"] = saved_bytes(forwards[name])
        row["peak_bytes"] = meter.peak_bytes(steps[name])
    return rows


def measure_attack(meter: Meter, batch: int, rounds: int, autocast: Callable) -> dict:
    """The gradient of one PGD step: into the image alone, or the course's way into everything."""
    images, labels = batch_of(batch, meter.device)

    def step(net: nn.Module, frozen: bool, x: Tensor) -> None:
        x = x.detach().requires_grad_()
        with autocast():
            loss = F.cross_entropy(net(x), labels)
        torch.autograd.grad(loss, x) if frozen else loss.backward()

    nets, calls = networks(meter.device), {}
    for name in (TORCH, TORCH_LAST, OURS):
        frozen = name != TORCH
        nets[name].requires_grad_(not frozen)
        x = images.contiguous(memory_format=WAYS[name][1])
        calls[f"{name}, frozen" if frozen else COURSE] = functools.partial(
            step, nets[name], frozen, x
        )
    return compare(meter, calls, rounds, COURSE)


def batch_of(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 128, 128, generator=generator)
    return images.to(device), torch.randint(100, (batch,), generator=generator).to(device)


def settings(device: torch.device, threads: list[int]) -> Iterator[tuple[str, Callable]]:
    """Threads on the CPU, precisions on CUDA: set each, yield its title and its autocast."""
    if device.type == "cpu":
        for n in threads:
            torch.set_num_threads(n)
            yield f"float32, {n} thread{'s' if n > 1 else ''}", nullcontext
        return
    torch.backends.cudnn.benchmark = True
    for precision in ("float32", "TF32", "bfloat16"):
        tf32 = precision == "TF32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        bfloat16 = functools.partial(torch.autocast, "cuda", torch.bfloat16)
        yield precision, bfloat16 if precision == "bfloat16" else nullcontext


def measure(device: torch.device, batch: int, args: argparse.Namespace) -> dict:
    meter, result = Meter(device), {"training": {}, "attack": {}, "layers": []}
    rounds = 2 if args.quick else args.rounds
    for title, autocast in settings(device, args.threads):
        if not result["layers"]:
            shapes = [(shape, batch) for shape in SIMPLENET]
            shapes += [(shape, batch // 4) for shape in SWEEP if not args.quick]
            result["layers"] = [measure_layer(meter, *each, rounds) for each in shapes]
        title = f"batch {batch}, {title}"
        result["training"][title] = measure_training(meter, batch, rounds, autocast)
        result["attack"][title] = measure_attack(meter, batch, rounds, autocast)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure our convolution beside torch's.")
    parser.add_argument("--gpu", type=int, default=-1, help="CUDA device; -1 = CPU")
    parser.add_argument("--batch", type=int, help="images a step (64 on the CPU, 256 on CUDA)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds, SimpleNet's layers only")
    args = parser.parse_args()
    device = torch.device("cpu" if args.gpu < 0 else f"cuda:{args.gpu}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    batch = args.batch or (64 if device.type == "cpu" else 256)
    cuda = device.type == "cuda"
    result = circumstances(device_name(device) if cuda else processor())
    result |= measure(device, batch, args)
    write(result, ROOT / "results" / f"conv_benchmark{'_cuda' * cuda}")


if __name__ == "__main__":
    main()
