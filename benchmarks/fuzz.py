"""Fuzz the readers of label files, images and checkpoints with corrupted files.

    python benchmarks/fuzz.py --labels 100000 --images 20000 --checkpoints 5000 --processes 60
    python benchmarks/fuzz.py --seconds 600          each kind for a quarter of the time
    python benchmarks/fuzz.py --case images:1234     repeat one case in this process

A case passes if the file is read and the result is valid, or if it is refused by a UserError; for
whole processes of main.py, by one line and exit code 1. It fails by any other error, a
hang of 20 seconds, a crash, a changed input file, or code of the input that ran. Writes
results/reliability.md; exits with 1 if any case failed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from mutators import corrupt_bytes, corrupt_checkpoint, corrupt_labels, images
from results_file import ROOT, origin, origin_line, write_section
from torch import nn

from custom_dataloader import read_label_file
from custom_transforms import CenterCrop, Compose, Scale
from deepvision import checkpoint
from deepvision.config import OneLineParser
from deepvision.models.registry import create_model
from deepvision.runtime.meters import EpochMetrics
from deepvision.runtime.provenance import command_line
from deepvision.training.overfitting_guard import CatastrophicOverfittingGuard
from deepvision.training.progress import Progress
from utils import UserError, load_image

TIMEOUT = 20  # seconds per case
WARNINGS = ("Corrupt JPEG", "libpng ", "warning: ")  # prefixes of lines before the error line
CLASSES = 10
LABELS = "".join(f"train/{n % 7}/kind {n % 5}/{n:08}.jpg {n % 10}\n" for n in range(12))
IMAGES = images()
PREPROCESS = Compose([Scale(144), CenterCrop(128)])
ORDER = {"-b": 16}  # stands for what the order of the batches follows from


# ---------------------------------------------------------------------------------------------
# Kinds of cases: each corrupts a file in `folder` and reads it; AssertionError = invalid result
# ---------------------------------------------------------------------------------------------


def fuzz_labels(rng: random.Random, folder: Path) -> None:
    """Read a corrupted label file."""
    path, data = folder / "train.txt", corrupt_labels(rng, LABELS)
    path.write_bytes(data)
    try:
        paths, labels = read_label_file(path, CLASSES)
    finally:
        assert path.read_bytes() == data, "the file was changed"
    assert len(paths) == len(labels) == len(set(paths)) > 0
    assert all(type(n) is int and 0 <= n < CLASSES for n in labels)
    root = os.path.abspath("/images")
    assert all(os.path.normpath(os.path.join(root, p)) == f"{root}/{p}" for p in paths)


def fuzz_images(rng: random.Random, folder: Path) -> None:
    """Decode and preprocess a corrupted image."""
    path, data = folder / "image", corrupt_bytes(rng, rng.choice(IMAGES))
    path.write_bytes(data)
    memory = peak_memory()
    try:
        image = load_image(path)
    finally:
        growth = peak_memory() - memory
        assert path.read_bytes() == data, "the file was changed"
        assert growth < 1000, f"{len(data)} bytes took {growth} MB of memory"
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert PREPROCESS(image).shape == (128, 128, 3)


def peak_memory() -> int:
    """The peak memory of this process so far, in MB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class Training:
    """A small network with the training state that a checkpoint holds."""

    def __init__(self, kind: type) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.optimizer = kind(self.model.parameters(), lr=0.1)
        if kind is torch.optim.SGD:
            self.optimizer.param_groups[0]["momentum"] = 0.9
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        self.progress = Progress(3, 2, 12.5, metric_sums=[1.0, 2, 3, 32, 2], data_order=ORDER)
        self.guard = CatastrophicOverfittingGuard(10.0, 40.0, 2, self.model.state_dict())
        self.step()

    def step(self) -> None:
        """Take one training step."""
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(torch.randn(6, 4)).square().sum()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def ckpt(self) -> dict:
        """A checkpoint."""
        return {
            **self.progress.state_dict(),
            "model_arch": "simplenet",
            "kind": "torch_conv",
            "state_dict": self.model.state_dict(),
            "left_out": [],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": 7},
            "trained": self.model.state_dict(),
            "scaler": self.scaler.state_dict(),
            "watchdog": self.guard.state_dict(),
        }

    def restore(self, ckpt: dict, path: Path) -> None:
        """Restore what a resumed run restores, and train on."""
        if ckpt.get("trained") is not None:
            checkpoint.load_weights(self.model, ckpt, path, "trained")
        with checkpoint.validated("epoch, best_acc1 or progress"):
            self.progress.load_state_dict(ckpt)
        checkpoint.load_optimizer(self.optimizer, ckpt)
        checkpoint.skipped_images(ckpt)
        checkpoint.load_scaler(self.scaler, ckpt)
        if ckpt.get("watchdog") is not None:
            with checkpoint.validated("watchdog"):
                self.guard.load_state_dict(ckpt["watchdog"], self.model)
        if self.progress.metric_sums:
            EpochMetrics(torch.device("cpu")).load_state_dict(self.progress.metric_sums)
        self.step()


def fuzz_checkpoints(rng: random.Random, folder: Path) -> None:
    """Resume from a corrupted checkpoint; a valid one in the same folder must not change."""
    training, canary = Training(rng.choice([torch.optim.SGD, torch.optim.AdamW])), folder / "canary"
    path, valid = folder / checkpoint.LAST, folder / checkpoint.PREVIOUS
    if not valid.exists():
        checkpoint.save(valid, training.ckpt())
    before, data = valid.read_bytes(), corrupt_checkpoint(rng, training.ckpt(), str(canary))
    path.write_bytes(data)
    weights = [v.clone() for v in training.model.state_dict().values()]
    try:
        ckpt = checkpoint.load(path)
        checkpoint.load_weights(training.model, ckpt, path)
    except UserError as e:
        now = training.model.state_dict().values()
        assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True)), "partly loaded"
        assert valid.name in str(e) or path.name in str(e)
        raise
    finally:
        assert not canary.exists(), "code of the file ran"
        assert (path.read_bytes(), valid.read_bytes()) == (data, before), "a file was changed"
    training.restore(ckpt, path)


def fuzz_processes(rng: random.Random, folder: Path) -> None:
    """Run main.py on a corrupted data folder or checkpoint."""
    data, network = folder / "data", folder / "valid.pth.tar"
    flags = ["--gpu=-1", f"-j={rng.randrange(2)}", "-b=4", "-e"]
    if not network.exists():
        make_valid_input(folder)
    corrupted = shutil.copytree(data, folder / "corrupted", dirs_exist_ok=True)
    target, resume = rng.randrange(4), network
    if target == 0:
        (corrupted / "val.txt").write_bytes(corrupt_labels(rng, (data / "val.txt").read_text()))
    elif target == 1:
        image = rng.choice(sorted((corrupted / "images" / "val").iterdir()))
        image.write_bytes(corrupt_bytes(rng, rng.choice(IMAGES)))
    else:
        resume = folder / "corrupted.pth.tar"
        ckpt = torch.load(network, weights_only=True)
        resume.write_bytes(corrupt_checkpoint(rng, ckpt, str(folder / "canary")))
        flags[-1] = "-e" if target == 2 else "--epochs=1"
    words = [sys.executable, "main.py", str(corrupted), f"--resume={resume}", *flags]
    run = subprocess.run(words, cwd=folder / "code", capture_output=True, text=True, timeout=300)
    output = f"{run.stdout}{run.stderr}"
    assert not (folder / "canary").exists(), "code of the file ran"
    assert run.returncode in (0, 1) and "Traceback" not in output, output
    errors = [line for line in run.stderr.splitlines() if not line.startswith(WARNINGS)]
    assert len(errors) == run.returncode, output
    if run.returncode:
        raise UserError(errors[0])


def make_valid_input(folder: Path) -> None:
    """Make code/, sample data and a checkpoint that fit together."""
    shutil.copytree(ROOT / "code", folder / "code")
    draw = [sys.executable, "make_sample_data.py", str(folder / "data"), "--train=2", "--val=1"]
    subprocess.run(draw, cwd=ROOT / "code", check=True, stdout=subprocess.DEVNULL)
    model = create_model("torch_conv", CLASSES)
    ckpt = {"state_dict": model.state_dict(), "epoch": 0, "kind": "torch_conv"}
    checkpoint.save(folder / "valid.pth.tar", ckpt)


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "labels": fuzz_labels,
    "images": fuzz_images,
    "checkpoints": fuzz_checkpoints,
    "processes": fuzz_processes,
}


# ---------------------------------------------------------------------------------------------
# Running the cases
# ---------------------------------------------------------------------------------------------


def run_case(kind: str, seed: int, number: int, folder: Path) -> str:
    """Run one case: 'read', 'refused', or the description of a failure."""
    try:
        KINDS[kind](random.Random(f"{seed} {kind} {number}"), folder)
    except UserError as e:
        return "refused" if len(str(e).strip().splitlines()) == 1 else f"several lines: {e}"
    except Exception:
        return traceback.format_exc()
    return "read"


def work(kind: str, seed: int, numbers: range, folder: Path, current, counts) -> None:
    """Run cases in this process; `current` is the number of the case, in case it dies or hangs."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders print to it
    for current.value in numbers:
        outcome = run_case(kind, seed, current.value, folder)
        if outcome == "read":
            counts[0] += 1
        elif outcome == "refused":
            counts[1] += 1
        else:
            print(f"FAILED --case {kind}:{current.value}\n{outcome}", flush=True)
            counts[2] += 1


def run_cases(kind: str, seed: int, count: int, seconds: float, folder: Path) -> Counter:
    """Run `count` cases, or for `seconds`; a process that dies or hangs is replaced."""
    current = multiprocessing.Value(ctypes.c_long, -1, lock=False)
    counts = multiprocessing.Array(ctypes.c_long, 3, lock=False)
    timeout = TIMEOUT * (20 if kind == "processes" else 1)
    end, crashes = time.monotonic() + seconds, 0
    while current.value + 1 < count and time.monotonic() < end:
        arguments = (kind, seed, range(current.value + 1, count), folder, current, counts)
        process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
        process.start()
        wait_for_progress(process, kind, current, timeout, end)
        over = time.monotonic() >= end
        process.kill()
        process.join()
        if process.exitcode != 0 and not over:
            crashes += 1
            code = process.exitcode
            print(f"FAILED --case {kind}:{current.value}: hang or crash, exit code {code}")
    print(file=sys.stderr)
    return Counter(read=counts[0], refused=counts[1], failed=counts[2] + crashes)


def wait_for_progress(
    process: multiprocessing.Process, kind: str, current, timeout: float, end: float
) -> None:
    """Return when the process ends, a case takes longer than `timeout`, or it is `end`."""
    since, last = time.monotonic(), current.value
    while process.is_alive() and time.monotonic() < end and time.monotonic() - since <= timeout:
        process.join(1)
        if current.value != last:
            since, last = time.monotonic(), current.value
            print(f"\r{kind}: {last + 1}", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Run the cases and write the section; return 1 if any failed."""
    parser = OneLineParser(description=__doc__)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, help="number of cases")
    parser.add_argument("--seconds", type=float, default=0, help="time for all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument("--case", default="", metavar="KIND:NUMBER", help="repeat one case")
    args = parser.parse_args(argv[1:])
    torch.set_num_threads(1)
    Training(torch.optim.SGD)  # torch imports now what each process would import
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # faster than a disk
    results = {}
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        folders = {kind: Path(scratch) / kind for kind in KINDS}
        for folder in folders.values():
            folder.mkdir()
        if args.case:
            kind, number = args.case.split(":")
            print(run_case(kind, args.seed, int(number), folders[kind]))
            return 0
        for kind in KINDS:
            count = 10**9 if args.seconds else getattr(args, kind)
            seconds = args.seconds / len(KINDS) or float("inf")
            results[kind] = run_cases(kind, args.seed, count, seconds, folders[kind])
            print(f"{kind}: {dict(results[kind])}", flush=True)
    write_results(results, command_line(argv))
    return 1 if any(result["failed"] for result in results.values()) else 0


def write_results(results: dict[str, Counter], command: str) -> None:
    """Write the section of results/reliability.md."""
    rows = [
        f"| {kind} | {r.total():,} | {r['read']:,} | {r['refused']:,} | {r['failed']} |"
        for kind, r in results.items()
    ]
    lines = [
        "Failed = any error other than one clear line, a crash, a hang (20 s), a changed input "
        "file, a partly loaded network, or code of the input that ran. Processes = main.py as a "
        "whole; warnings may come before its error line.",
        "",
        "| input | corrupted files | read | refused | failed |",
        "|---|---|---|---|---|",
        *rows,
        "",
        origin_line(origin(command)),
    ]
    write_section("reliability.md", "Corrupted input", "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
