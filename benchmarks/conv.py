"""Compare CustomConv2d with nn.Conv2d: time, memory, bytes saved for backward, error.

    python benchmarks/conv.py              # CPU, one and two threads: some minutes
    python benchmarks/conv.py --quick      # fewer rounds and shapes
    python benchmarks/conv.py --gpu 0      # CUDA: float32, TF32 and bfloat16 at batch size 256

The implementations alternate within each round; a ratio is the median of the rounds' ratios. On
one CPU thread the time is CPU time, so that other work on the machine has little influence. Writes
results/conv_benchmark.{json,md,png}, on CUDA results/conv_benchmark_cuda.{json,md,png}.
"""

from __future__ import annotations

import argparse
import copy
import functools
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from conv_report import COURSE, OURS, OURS_NCHW, TORCH, TORCH_LAST, UNFOLD, write
from results_file import RESULTS, origin
from torch import Tensor, nn

from deepvision.config import OneLineParser, device_id
from deepvision.runtime.device import choose_device
from deepvision.runtime.matmul import configure_matmul
from deepvision.runtime.memory import release_freed_memory
from deepvision.runtime.provenance import command_line
from student_code import CustomConv2d, SimpleNet

GPU = "index of the GPU, -1 = CPU; also cpu, cuda:N"


class UnfoldConv2d(nn.Conv2d):
    """The usual solution: unfold the whole batch, multiply; autograd saves the columns."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_i, H, W) -> (N, C_o, H', W')."""
        columns = F.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride)
        y = self.weight.flatten(1) @ columns + self.bias[:, None]
        sides = [(s + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1
                 for s in x.shape[2:]]  # fmt: skip
        return y.view(len(x), -1, *sides)


# name -> (layer, memory format); each is compared with the first
IMPLEMENTATIONS = {
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
        """Wall time of the call; CPU time on one CPU thread."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        one_thread = self.device.type == "cpu" and torch.get_num_threads() == 1
        now = time.process_time if one_thread else time.perf_counter
        start = now()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return now() - start

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Peak memory of the call above the memory in use before; None where unknown (no Linux)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return torch.cuda.max_memory_allocated() - before
        status = Path("/proc/self/status")
        if not status.exists():
            return None
        release_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
        before = resident_bytes(status)["VmRSS"]
        call()
        return resident_bytes(status)["VmHWM"] - before


def resident_bytes(status: Path) -> dict[str, int]:
    """Resident memory (VmRSS) and its peak (VmHWM) from /proc/self/status."""
    lines = re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status.read_text(), re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in lines}


def saved_bytes(forward: Callable[[], object]) -> int:
    """The bytes that a forward pass saves for backward."""
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(sizes)


def compare(meter: Meter, calls: dict[str, Callable], rounds: int, base: str) -> dict[str, dict]:
    """By name of the call: median milliseconds, and the median over rounds of its time / base's."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            elapsed = meter.seconds(call)
            if i > 0:  # the first round is warm-up
                seconds[name].append(elapsed)
    return {
        name: {
            "ms": round(1e3 * statistics.median(elapsed), 3),
            "ratio": median_ratio(elapsed, seconds[base]),
        }
        for name, elapsed in seconds.items()
    }


def median_ratio(elapsed: list[float], base: list[float]) -> float:
    """The median over rounds of elapsed / base."""
    return round(statistics.median(a / b for a, b in zip(elapsed, base, strict=True)), 3)


# ---------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------


def forward_backward(layer: nn.Module, x: Tensor, G: Tensor) -> list[Tensor]:
    """The output, the gradients of the parameters, and that of x if x requires one."""
    y = layer(x)
    inputs = [*layer.parameters(), *([x] if x.requires_grad else [])]
    return [y, *torch.autograd.grad(y, inputs, G)]


def measure_layer(meter: Meter, shape: tuple[int, ...], batch: int, rounds: int) -> dict:
    """Forward and backward of one layer, all implementations with the same weights and images."""
    C_i, C_o, K, S, P, H = shape
    input_grad = shape != SIMPLENET[0]  # the first layer's input is the images
    calls, forwards = {}, {}
    for name, (kind, layout) in IMPLEMENTATIONS.items():
        torch.manual_seed(0)
        layer = kind(C_i, C_o, K, S, P).to(meter.device, memory_format=layout)
        x = torch.randn(batch, C_i, H, H).to(meter.device, memory_format=layout)
        G = torch.randn(layer(x).shape).to(meter.device, memory_format=layout)
        calls[name] = functools.partial(forward_backward, layer, x.requires_grad_(input_grad), G)
        forwards[name] = functools.partial(layer, x)
        if name == TORCH:
            double = copy.deepcopy(layer).double(), x.detach().double(), G.double()
            exact = forward_backward(double[0], double[1].requires_grad_(input_grad), double[2])
    rows = compare(meter, calls, rounds, TORCH)
    for name, row in rows.items():
        row["saved_bytes"] = saved_bytes(forwards[name])
        row["error"] = max(map(relative_error, calls[name](), exact))
    names = ("C_i", "C_o", "K", "S", "P", "H")
    return {"shape": dict(zip(names, shape, strict=True)), "N": batch, "implementations": rows}


def relative_error(a: Tensor, exact: Tensor) -> float:
    """The largest absolute error, relative to the largest absolute value."""
    return ((a.double() - exact).abs().max() / exact.abs().max()).item()


def networks(device: torch.device) -> dict[str, nn.Module]:
    """SimpleNet on each implementation, all with the same weights."""
    nets = {}
    for name, (kind, layout) in IMPLEMENTATIONS.items():
        torch.manual_seed(0)
        nets[name] = SimpleNet(kind).to(device, memory_format=layout)
    return nets


def measure_training(meter: Meter, batch: int, rounds: int, autocast: Callable) -> dict:
    """A training step of SimpleNet: forward, backward, SGD."""
    images, labels = random_batch(batch, meter.device)
    steps, forwards = {}, {}
    for name, net in networks(meter.device).items():
        x = images.contiguous(memory_format=IMPLEMENTATIONS[name][1])
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
    """The gradient of one PGD step: of the images only, or of the weights too (the baseline)."""
    images, labels = random_batch(batch, meter.device)

    def step(net: nn.Module, frozen: bool, x: Tensor) -> None:
        x = x.detach().requires_grad_()
        with autocast():
            loss = F.cross_entropy(net(x), labels)
        torch.autograd.grad(loss, x) if frozen else loss.backward()

    nets, calls = networks(meter.device), {}
    for name in (TORCH, TORCH_LAST, OURS):
        frozen = name != TORCH
        nets[name].requires_grad_(not frozen)
        x = images.contiguous(memory_format=IMPLEMENTATIONS[name][1])
        calls[f"{name}, frozen" if frozen else COURSE] = functools.partial(
            step, nets[name], frozen, x
        )
    return compare(meter, calls, rounds, COURSE)


def random_batch(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Gaussian images (N, 3, 128, 128) and labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 128, 128, generator=generator)
    return images.to(device), torch.randint(100, (batch,), generator=generator).to(device)


def settings(device: torch.device, threads: list[int]) -> Iterator[tuple[str, Callable]]:
    """Set each number of threads (CPU) or precision (CUDA); yield its title and autocast."""
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
    """The results by title of the setting, and those of single layers."""
    meter, result = Meter(device), {"training": {}, "attack": {}, "layers": []}
    rounds = 2 if args.quick else args.rounds
    for title, autocast in settings(device, args.threads):
        if not result["layers"]:
            shapes = [(shape, batch) for shape in SIMPLENET]
            shapes += [(shape, batch // 4) for shape in SWEEP if not args.quick]
            result["layers"] = [measure_layer(meter, shape, n, rounds) for shape, n in shapes]
        title = f"batch {batch}, {title}"
        result["training"][title] = measure_training(meter, batch, rounds, autocast)
        result["attack"][title] = measure_attack(meter, batch, rounds, autocast)
    return result


def main(argv: Sequence[str]) -> None:
    """Measure and write the results."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--gpu", "--device", type=device_id, metavar="N", default=-1, help=GPU)
    parser.add_argument("--batch", type=int, help="images per step (CPU: 64, CUDA: 256)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all implementations")
    parser.add_argument("--quick", action="store_true", help="two rounds, SimpleNet's layers only")
    args = parser.parse_args(argv[1:])
    device = choose_device(args.gpu, "--gpu")
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    result = origin(command_line(argv), str(device))
    if not cuda:
        configure_matmul()
    result |= measure(device, args.batch or (256 if cuda else 64), args)
    write(result, RESULTS / f"conv_benchmark{'_cuda' * cuda}")


if __name__ == "__main__":
    main(sys.argv)
