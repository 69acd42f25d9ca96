"""The parts of gpu_check.py, each run in a separate process: python gpu_parts.py PART FILE ...

A part returns what it found, for the JSON file: `verdict` is one line, `ok` says whether it is as
it should be. On a CPU, or with --small, a part does less and judges correctness only.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path

import torch
from results_file import ROOT
from run_state import final_state
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import main
from custom_dataloader import MiniPlacesLoader
from deepvision.attacks import APGD, PGD, AutoAttack, InputScale
from deepvision.config import OneLineParser
from deepvision.data.cache import enable_cache
from deepvision.data.loader import training_batches
from deepvision.evaluation.robust_eval import evaluate_robustness
from deepvision.models import registry, student
from deepvision.runtime.device import amp_problem, configure_backend, prepare_model
from deepvision.runtime.jsonl import read_metrics
from deepvision.runtime.meters import EpochMetrics, StepTimer
from deepvision.training import optim
from deepvision.training.engine import train_epoch
from deepvision.training.objectives import Standard
from student_code import custom_conv2d

KINDS = ("torch_conv", "custom_conv", "vit", "resnet18", "scene_net")
FLAGS = {"custom_conv": "--use-custom-conv", "vit": "--use-vit", "scene_net": "--use-scene-net"}
# Largest relative error of gradients against float64 on the CPU
TOLERANCES = {"float32": 5e-4, "tf32": 5e-2, "bf16": 0.15, "fp16": 5e-2}
LOGS_ARE_FIRST = (
    "import sys; from pathlib import Path; import main; "
    "sys.exit(main.main(sys.argv[2:], Path(sys.argv[1])))"
)
Found = dict[str, object]


# ---------------------------------------------------------------------------------------------
# Shared
# ---------------------------------------------------------------------------------------------


def device_of(args: argparse.Namespace) -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if args.cuda else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main_command(args: argparse.Namespace, logs: Path, *flags: str) -> list[str]:
    """main.py as a command whose run folders are in `logs`."""
    where = [] if args.cuda else ["--gpu=-1"]
    return [sys.executable, "-c", LOGS_ARE_FIRST, str(logs), *flags, *where]


def run_main(args: argparse.Namespace, logs: Path, data: Path, *flags: str) -> tuple[Path, float]:
    """Run main.py to its end; its run folder, and the seconds it took, start included.

    Raises:
        RuntimeError: it fails; the message is its last line.
    """
    start = time.perf_counter()
    command = main_command(args, logs, str(data), *flags)
    done = subprocess.run(command, cwd=ROOT / "code", capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.splitlines() or ["no output"])[-1])
    newest = max(logs.glob("*_exp_*"), key=lambda folder: folder.stat().st_mtime)
    return newest, time.perf_counter() - start


def subset(args: argparse.Namespace, folder: Path, train: int, val: int) -> Path:
    """A data folder with so many images of each split, evenly spread over the labels."""
    (folder / "images").symlink_to((args.data / "images").resolve())
    for split, n in (("train", train), ("val", val)):
        lines = (args.data / f"{split}.txt").read_text().splitlines(keepends=True)
        (folder / f"{split}.txt").write_text("".join(lines[:: max(1, len(lines) // n)][:n]))
    return folder


class Training:
    """Steps of the training loop on one batch of noise, which lies on the device."""

    def __init__(self, args, kind: str, amp: str = "off", compiled: bool = False) -> None:
        self.device, size = device_of(args), 4 if args.small else 256
        configure_backend(self.device, training=True)
        torch.manual_seed(0)
        network = registry.create_model(kind, 100)
        self.model, self.context = prepare_model(network, self.device, amp, compiled)
        images, labels = torch.randn(size, 3, 128, 128), torch.randint(100, (size,))
        self.batch = self.context.to_device(images, labels)
        fused = args.cuda
        self.optimizer = optim.make_optimizer(self.model, kind, 0.01, 1e-4, 0.9, fused)
        self.scheduler = optim.make_scheduler(self.optimizer, 0.01, 0, 1, 10_000, 0)
        self.ema = optim.make_ema(self.model, 0.1, 100, 0) if kind == "scene_net" else None

    def run(self, steps: int) -> float:
        """Seconds per step, synchronised at the end."""
        synchronize(self.device)
        start, rest = time.perf_counter(), (EpochMetrics(self.device), StepTimer())
        parts = (self.optimizer, self.scheduler, self.context, *rest)
        batches = repeat(self.batch, steps)
        train_epoch(self.model, batches, Standard(), *parts, seed=0, ema=self.ema)
        synchronize(self.device)
        return (time.perf_counter() - start) / steps


# ---------------------------------------------------------------------------------------------
# Correctness
# ---------------------------------------------------------------------------------------------


def versions(args: argparse.Namespace) -> Found:
    """What this machine is."""
    found = {"cores": os.cpu_count(), "cuda": torch.version.cuda, "torch": torch.__version__}
    name = "CPU"
    if args.cuda:
        properties = torch.cuda.get_device_properties(0)
        name, found["gpu_bytes"] = properties.name, properties.total_memory
        found["capability"] = list(torch.cuda.get_device_capability(0))
        found["cudnn"] = torch.backends.cudnn.version()
    return found | {"ok": True, "verdict": f"{name}, torch {torch.__version__}"}


def outcome(model: nn.Module, x: torch.Tensor, y: torch.Tensor, scale: float) -> list:
    """Logits and the gradients of all parameters, in float64 on the CPU."""
    logits = model(x)
    loss = nn.functional.cross_entropy(logits, y)
    gradients = torch.autograd.grad(scale * loss, list(model.parameters()))
    flat = torch.cat([g.detach().double().cpu().flatten() for g in gradients]) / scale
    return [logits.detach().double().cpu(), flat]


def parity(args: argparse.Namespace) -> Found:
    """Logits and gradients of each network and format, against float64 on the CPU."""
    device, found, bad = device_of(args), {}, []
    formats = ["float32", "tf32", "bf16", "fp16"] if args.cuda else ["float32", "bf16"]
    for kind in KINDS[:2] if args.small else KINDS:
        torch.manual_seed(0)
        network = registry.create_model(kind, 10).eval()
        x, y = torch.randn(2 if args.small else 8, 3, 128, 128), torch.tensor([1, 3] * 4)
        expected = outcome(copy.deepcopy(network).double(), x.double(), y[: len(x)], 1)
        for name in formats:
            if amp_problem(name, device):
                continue
            torch.backends.cudnn.allow_tf32 = name == "tf32"
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            amp = name if name in ("bf16", "fp16") else "off"
            model, context = prepare_model(copy.deepcopy(network), device, amp)
            logits = outcome(
                model, *context.to_device(x, y[: len(x)]), 1024 if amp == "fp16" else 1
            )
            pairs = zip(logits, expected, strict=True)
            errors = [((a - e).norm() / e.norm()).item() for a, e in pairs]
            found[f"{kind} {name}"] = errors
            if not errors[1] < TOLERANCES[name]:
                bad.append(f"{kind} {name} {errors[1]:.1e}")
    worst = max(errors[1] for key, errors in found.items() if "float32" in key)
    verdict = "; ".join(bad) or f"{len(found)} pairs, worst float32 gradient {worst:.1e}"
    return {"relative_errors": found, "ok": not bad, "verdict": verdict}


def convolution(args: argparse.Namespace) -> Found:
    """The custom convolution: double backward; a step's time and memory over nn.Conv2d's."""
    device, found, ratios = device_of(args), {}, []
    tensors = [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True)
               for s in ((2, 2, 6, 5), (3, 2, 3, 3), (3,))]  # fmt: skip
    for stride, padding in ((1, 1), (2, 0)):

        def convolve(x, w, b, stride=stride, padding=padding):
            return custom_conv2d(x, w, b, stride, padding)

        assert gradcheck(convolve, tensors) and gradgradcheck(convolve, tensors)
    for amp in ("off", "bf16") if args.cuda else ("off",):
        for kind in ("torch_conv", "custom_conv"):
            training = Training(args, kind, amp)
            training.run(1 if args.small else 5)
            if args.cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = training.run(1 if args.small else 20)
            found[f"{kind} {amp}"] = {"seconds": seconds, "bytes": training.context.peak_memory()}
        ratios.append(
            found[f"custom_conv {amp}"]["seconds"] / found[f"torch_conv {amp}"]["seconds"]
        )
    verdict = f"double backward right; a step takes {max(ratios):.2f} × nn.Conv2d's"
    return {"steps": found, "ok": args.small or max(ratios) <= 1.15, "verdict": verdict}


def resume(args: argparse.Namespace) -> Found:
    """A run killed after two epochs and resumed ends like one that was not, to the bit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        data = subset(args, folder / "data", *((32, 8) if args.small else (2000, 200)))
        size = 8 if args.small else 64
        flags = ["--epochs=4", "--warmup=1", f"-b={size}", "--deterministic", "--save-every=3"]
        whole, _ = run_main(args, folder / "whole", data, *flags)
        command = main_command(args, folder / "killed", str(data), *flags)
        process = subprocess.Popen(command, cwd=ROOT / "code", stdout=subprocess.DEVNULL)
        rows = folder / "killed"
        while process.poll() is None:
            if any(len(read_metrics(f)) >= 2 for f in rows.glob("*/metrics.jsonl")):
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        resumed, _ = run_main(args, folder / "killed", data, *flags, "--resume=auto")
        states = final_state(whole), final_state(resumed)
        differ = [key for key in states[0] if states[0][key] != states[1][key]]
    killed = process.returncode == -signal.SIGKILL
    verdict = f"differ: {', '.join(differ)}" if differ else "killed and resumed: the same bits"
    return {"killed": killed, "differ": differ, "ok": killed and not differ, "verdict": verdict}


def cache(args: argparse.Namespace) -> Found:
    """The device cache makes the pictures of the ordinary loader, up to rounding."""
    device, batches, seconds = device_of(args), [], []
    with tempfile.TemporaryDirectory() as name:
        data = subset(args, Path(name), 32 if args.small else 512, 1)
        for place in ("none", "device"):
            dataset = MiniPlacesLoader(data, None, 10_000, "train", student.train_transforms())
            enable_cache(dataset, place, 0, device)
            loader = training_batches(dataset, len(dataset), 1, 0, device)
            start = time.perf_counter()
            batches.append(next(iter(loader))[0].cpu())
            seconds.append(time.perf_counter() - start)
    levels = (batches[0] - batches[1]).abs() * 0.225 * 255  # std is 0.225 to 2 %
    found = {"mean_levels": levels.mean().item(), "far": (levels > 2.1).float().mean().item()}
    verdict = f"{found['mean_levels']:.4f} intensity levels apart on average"
    ok = found["mean_levels"] < 0.4 and found["far"] < 2e-3
    return found | {"seconds": seconds, "ok": ok, "verdict": verdict}


def synchronisations(args: argparse.Namespace) -> Found:
    """How often 20 steps of SceneNet with EMA wait for the GPU."""
    if not args.cuda:
        return {"ok": True, "verdict": "needs a GPU"}
    training, steps = Training(args, "scene_net", "bf16"), 20
    training.run(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        training.run(steps)
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w.message)]
    verdict = f"{len(places)} in {steps} steps"
    return {"places": places, "ok": len(places) <= 3, "verdict": verdict}


def compiled(args: argparse.Namespace) -> Found:
    """SceneNet and SimpleViT: seconds to compile, and a step before and after."""
    if args.small:
        return {"ok": True, "verdict": "left out in small mode"}
    found = {}
    for kind in ("scene_net", "vit"):
        eager, training = Training(args, kind, "bf16"), Training(args, kind, "bf16", True)
        eager.run(3)
        start = time.perf_counter()
        training.run(3)
        seconds = time.perf_counter() - start
        times = {"eager": eager.run(20), "compiled": training.run(20)}
        found[kind] = {"seconds_to_compile": seconds, **times}
    gain = max(times["eager"] / times["compiled"] for times in found.values())
    return {"networks": found, "ok": True, "verdict": f"up to {gain:.2f} times as fast"}


def processes(args: argparse.Namespace) -> Found:
    """One process under torchrun: NCCL, or gloo on a CPU."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        data = subset(args, folder / "data", 32, 8)
        script = folder / "run.py"
        script.write_text(LOGS_ARE_FIRST)
        words = ["--standalone", "--nproc_per_node=1", str(script), str(folder / "logs"), str(data)]
        where = [] if args.cuda else ["--gpu=-1"]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words, "--epochs=1", "-b=8", *where],
            cwd=ROOT / "code",
            env=os.environ | {"PYTHONPATH": str(ROOT / "code"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    verdict = "trains" if done.returncode == 0 else (done.stderr.splitlines() or [""])[-1]
    return {"ok": done.returncode == 0, "verdict": verdict}


def out_of_memory(args: argparse.Namespace) -> Found:
    """A batch that the GPU cannot hold is one line that names -b."""
    if not args.cuda:
        return {"ok": True, "verdict": "needs a GPU"}
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 3e8 / total))
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()) as err:
        (Path(name) / "data").mkdir()
        data = subset(args, Path(name) / "data", 600, 100)
        code = main.main([str(data), "--epochs=1", "--cache=none"], Path(name) / "logs")
    lines = err.getvalue().splitlines()
    ok = code == 1 and len(lines) == 1 and "-b 128" in lines[0]
    return {"ok": ok, "verdict": (lines or ["no error"])[-1]}


# ---------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace) -> Found:
    """Images per second of the last of three epochs: default flags first, then each network."""
    runs = {"default": [], "--amp=bf16": ["--amp=bf16"]}
    if args.small:
        runs = {"default": []}
    else:
        runs |= {flag: ["--amp=bf16", flag] for flag in FLAGS.values()}
    found = {}
    with tempfile.TemporaryDirectory() as name:
        data, size = args.data, []
        if args.small:
            (Path(name) / "data").mkdir()
            data, size = subset(args, Path(name) / "data", 32, 8), ["-b=8"]
        for run, flags in runs.items():
            logs = Path(name) / f"logs{len(found)}"
            folder, seconds = run_main(args, logs, data, "--epochs=3", *size, *flags)
            row = read_metrics(folder / "metrics.jsonl")[-1]
            found[run] = {"images_per_second": row["images_per_second"], "seconds": seconds}
    verdict = ", ".join(f"{run} {row['images_per_second']:.0f}/s" for run, row in found.items())
    return {"runs": found, "ok": True, "verdict": verdict}


def profile(args: argparse.Namespace) -> Found:
    """The kernels that take the time of a step, by network."""
    found, kinds = {}, KINDS[:1] if args.small else KINDS
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if args.cuda else []
    column = "self_device_time_total" if args.cuda else "self_cpu_time_total"
    for kind in kinds:
        training = Training(args, kind, "bf16" if args.cuda else "off")
        training.run(1 if args.small else 10)
        with torch.profiler.profile(activities=activities) as profiler:
            seconds = training.run(1)
        events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, column))[:12]
        kernels = {e.key[:90]: [getattr(e, column) / 1000, e.count] for e in events}
        found[kind] = {"ms": 1000 * seconds, "ms_and_calls_by_kernel": kernels}
    text = (f"{kind} {row['ms']:.1f} ms" for kind, row in found.items())
    return {"networks": found, "ok": True, "verdict": ", ".join(text)}


def attacks(args: argparse.Namespace) -> Found:
    """Seconds per image of PGD-10 and APGD-100 on SimpleNet."""
    device, n = device_of(args), 4 if args.small else 200
    configure_backend(device)
    model, context = prepare_model(registry.create_model("torch_conv", 100).eval(), device)
    x, y = context.to_device(torch.rand(n, 3, 128, 128), torch.randint(100, (n,)))
    options = {"epsilon": 4, "pixels": InputScale("255", (0.0,) * 3, (1.0,) * 3)}
    found = {}
    PGD(steps=1, **options).perturb(model, x, y)  # the first pass loads kernels
    for attack in (PGD(steps=10, **options), APGD(steps=2 if args.small else 100, **options)):
        start = time.perf_counter()
        attack.perturb(model, x, y)
        synchronize(device)
        found[type(attack).__name__] = (time.perf_counter() - start) / n
    verdict = ", ".join(f"{name} {1000 * s:.2f} ms per image" for name, s in found.items())
    return {"seconds_per_image": found, "ok": True, "verdict": verdict}


# ---------------------------------------------------------------------------------------------
# Goals
# ---------------------------------------------------------------------------------------------


def goal(args: argparse.Namespace, limit: float | None, *flags: str) -> Found:
    """A whole training: seconds from the start of the command to the last validation, top-1."""
    with tempfile.TemporaryDirectory() as name:
        folder, seconds = run_main(args, Path(name), args.data, "--epochs=60", *flags)
        rows = read_metrics(folder / "metrics.jsonl")
    clock, reached = seconds - sum(row["seconds"] for row in rows), {}  # the start comes first
    for row in rows:
        clock += row["seconds"]
        for accuracy in (40, 50):
            if row["val_top1_accuracy"] >= accuracy:
                reached.setdefault(accuracy, clock)
    best = max(row["val_top1_accuracy"] for row in rows)
    times = "".join(f", {a} % after {s:.0f} s" for a, s in reached.items())
    found = {"seconds": seconds, "best_top1": best, "seconds_to": reached, "flags": flags}
    verdict = f"{seconds:.0f} s, best top-1 {best:.2f}{times}"
    return found | {"ok": limit is None or seconds < limit, "verdict": verdict}


def robust(args: argparse.Namespace) -> Found:
    """CIFAR-10: PreAct ResNet-18 by FGSM-RS in bf16, then AutoAttack on 1,000 test images."""
    from reverse_attack import classifier, data  # Part IV

    start, images = time.perf_counter(), 20 if args.small else 1000
    train = ["reverse_attack/train.py", "--task=Robust", "--bf16", f"--data-root={args.data}"]
    size = ["--limit=256", "--epochs=1"] if args.small else ["--arch=preact18", "--epochs=20"]
    size += [] if args.cuda else ["--gpu=-1"]
    done = subprocess.run(
        [sys.executable, *train, *size], cwd=ROOT / "code", capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr.splitlines()[-1])
    run = next(line for line in done.stdout.splitlines() if line.startswith("Run: "))
    file = ROOT / "code" / run.removeprefix("Run: ") / "models" / "model_best.pth.tar"
    device = device_of(args)
    model = classifier.load(file, "narrow", 10).model.to(device).eval()
    sample = data.list_images("cifar10", args.data, "test").sample(0, images)
    x, y = (torch.cat(parts).to(device) for parts in zip(*sample.batches(100), strict=True))
    pixels = InputScale("255", (0.0,) * 3, (1.0,) * 3)
    result = evaluate_robustness(model, x, y, AutoAttack(norm="linf", epsilon=8.0, pixels=pixels))
    accuracy, seconds = result.progress.accuracy, time.perf_counter() - start
    verdict = f"{accuracy:.1f} % of {len(y)} images right under AutoAttack, {seconds:.0f} s"
    ok = args.small or accuracy >= 43.2 and seconds < 720
    return {"accuracy": accuracy, "seconds": seconds, "ok": ok, "verdict": verdict}


def tests(args: argparse.Namespace) -> Found:
    """The whole test suite on this machine."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tail = [line for line in done.stdout.splitlines() if line.startswith("FAILED")][:20]
    last = (done.stdout.splitlines() or ["no output"])[-1]
    return {"failed": tail, "ok": done.returncode == 0, "verdict": last}


PARTS: dict[str, Callable[[argparse.Namespace], Found]] = {
    f.__name__: f
    for f in (versions, parity, convolution, resume, cache, compiled, synchronisations, processes)
    + (speed, profile, out_of_memory, attacks, robust, tests)
} | {
    "goal_default": lambda args: goal(args, 150),
    "goal_bf16": lambda args: goal(args, 60, "--amp=bf16"),
    "goal_scene_net": lambda args: goal(args, None, "--amp=bf16", "--use-scene-net"),
}


def run(argv: Sequence[str]) -> None:
    """Run one part and write what it found to a JSON file."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("part", metavar="PART", choices=PARTS, help="see gpu_check.py")
    parser.add_argument("file", type=Path, help="where to write")
    parser.add_argument("data", type=Path, help="data folder")
    parser.add_argument("--small", action="store_true", help="on the CPU")
    args = parser.parse_args(argv[1:])
    args.cuda = torch.cuda.is_available() and not args.small
    try:
        found = PARTS[args.part](args)
    except Exception as e:  # one part's failure is a finding, not the end of the check
        found = {"ok": False, "verdict": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"}
    args.file.write_text(json.dumps(found))


if __name__ == "__main__":
    run(sys.argv)
