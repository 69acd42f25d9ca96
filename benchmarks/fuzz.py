"""Feed spoilt label files, images and checkpoints to the code that reads them.

    python benchmarks/fuzz.py --labels 100000 --images 20000 --checkpoints 5000 --processes 60
    python benchmarks/fuzz.py --seconds 600          each kind for a quarter of the time
    python benchmarks/fuzz.py --case images:1234     one case again, in this process

A case passes if it is read, to something sane, or refused by a UserError; in whole processes of
main.py, by one line and exit code 1 or 2. It fails by any other error, by 20 seconds without an
answer, by a crash, by a changed input file, or by code of the input that ran. Writes
results/reliability.md; ends with 1 if any case failed.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mutators import images, spoil_bytes, spoil_checkpoint, spoil_labels
from results_file import ROOT, provenance, write_section
from torch import nn

sys.path.insert(0, str(ROOT / "code"))

from custom_dataloader import read_label_file  # noqa: E402
from custom_transforms import CenterCrop, Compose, Scale  # noqa: E402
from deepvision import checkpoint  # noqa: E402
from deepvision.training.engine import EpochMetrics  # noqa: E402
from deepvision.training.objectives import CatastrophicOverfittingGuard  # noqa: E402
from utils import UserError, load_image  # noqa: E402

PATIENCE = 20  # seconds
DECODERS = ("Corrupt JPEG", "libpng ")  # how lines begin that they print by themselves
CLASSES = 10
LABELS = "".join(f"train/{n % 7}/kind {n % 5}/{n:08}.jpg {n % 10}\n" for n in range(12))
TO_SIZE = Compose([Scale(144), CenterCrop(128)])


# ---------------------------------------------------------------------------------------------
# The kinds of cases: each spoils a file in `folder` and reads it; AssertionError = a wrong answer
# ---------------------------------------------------------------------------------------------


def labels(rng: random.Random, folder: Path) -> None:
    path, data = folder / "train.txt", spoil_labels(rng, LABELS)
    path.write_bytes(data)
    try:
        paths, numbers = read_label_file(path, CLASSES)
    finally:
        assert path.read_bytes() == data, "the file was changed"
    assert len(paths) == len(numbers) == len(set(paths)) > 0
    assert all(type(n) is int and 0 <= n < CLASSES for n in numbers)
    root = os.path.abspath("/images")
    assert all(os.path.normpath(os.path.join(root, p)) == f"{root}/{p}" for p in paths)


IMAGES = images()


def pictures(rng: random.Random, folder: Path) -> None:
    path, data = folder / "image", spoil_bytes(rng, rng.choice(IMAGES))
    path.write_bytes(data)
    memory = peak()
    try:
        image = load_image(path)
    finally:
        assert path.read_bytes() == data, "the file was changed"
        assert peak() - memory < 1000, f"{len(data)} bytes took {peak() - memory} MB of memory"
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert TO_SIZE(image).shape == (128, 128, 3)


def peak() -> int:
    """The most memory this process has had so far, in MB (on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class Training:
    """A small network and what training keeps of it."""

    def __init__(self, kind: type) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.optimizer = kind(self.model.parameters(), lr=0.1)
        if kind is torch.optim.SGD:
            self.optimizer.param_groups[0]["momentum"] = 0.9
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(torch.randn(6, 4)).square().sum()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def content(self) -> dict:
        return {
            "epoch": 3,
            "model_arch": "simplenet",
            "kind": "torch_conv",
            "state_dict": self.model.state_dict(),
            "best_acc1": 12.5,
            "left_out": [],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": 7},
            "progress": {"position": 2, "tally": [1.0, 2.0, 3.0, 32.0, 2.0], "order": {"-b": 16}},
            "trained": self.model.state_dict(),
            "scaler": self.scaler.state_dict(),
            "watchdog": CatastrophicOverfittingGuard(
                10.0, 40.0, 2, self.model.state_dict()
            ).state(),
        }


def checkpoints(rng: random.Random, folder: Path) -> None:
    """All that a resumed run does with a file, beside a good one that must stay good."""
    training, canary = Training(rng.choice([torch.optim.SGD, torch.optim.AdamW])), folder / "canary"
    path, good = folder / checkpoint.LAST, folder / checkpoint.PREVIOUS
    if not good.exists():
        checkpoint.save(good, training.content())
    before, data = good.read_bytes(), spoil_checkpoint(rng, training.content(), str(canary))
    path.write_bytes(data)
    weights = [v.clone() for v in training.model.state_dict().values()]
    try:
        content = checkpoint.load(path)
        checkpoint.load_weights(training.model, content, path)
    except UserError as e:
        now = training.model.state_dict().values()
        assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True)), "half loaded"
        assert good.name in str(e) or path.name in str(e)
        raise
    finally:
        assert not canary.exists(), "code of the file ran"
        assert (path.read_bytes(), good.read_bytes()) == (data, before), "a file was changed"
    if content.get("trained") is not None:
        checkpoint.load_weights(training.model, content, path, "trained")
    checkpoint.load_optimizer(training.optimizer, content)
    progress, _ = checkpoint.load_progress(content, {"-b": 16})
    checkpoint.skipped_images(content)
    checkpoint.load_scaler(training.scaler, content)
    checkpoint.load_watchdog(CatastrophicOverfittingGuard(10.0), training.model, content)
    if progress.tally:
        EpochMetrics(torch.device("cpu")).restore(progress.tally)
    training.step()


def processes(rng: random.Random, folder: Path) -> None:
    """main.py itself, on a data folder or a checkpoint that was spoilt."""
    data, network = folder / "data", folder / "whole.pth.tar"
    flags = ["--gpu=-1", f"-j={rng.randrange(2)}", "-b=4", "-e"]
    if not network.exists():
        make_whole(folder)
    spoilt = shutil.copytree(data, folder / "spoilt", dirs_exist_ok=True)
    way, resume = rng.randrange(4), network
    if way == 0:
        (spoilt / "val.txt").write_bytes(spoil_labels(rng, (data / "val.txt").read_text()))
    elif way == 1:
        image = rng.choice(sorted((spoilt / "images" / "val").iterdir()))
        image.write_bytes(spoil_bytes(rng, rng.choice(IMAGES)))
    else:
        resume = folder / "spoilt.pth.tar"
        content = torch.load(network, weights_only=True)
        resume.write_bytes(spoil_checkpoint(rng, content, str(folder / "canary")))
        flags[-1] = "-e" if way == 2 else "--epochs=1"
    words = [sys.executable, "main.py", str(spoilt), f"--resume={resume}", *flags]
    done = subprocess.run(words, cwd=folder / "code", capture_output=True, text=True, timeout=300)
    said = f"{done.stdout}{done.stderr}"
    assert not (folder / "canary").exists(), "code of the file ran"
    assert done.returncode in (0, 1) and "Traceback" not in said, said
    errors = [line for line in done.stderr.splitlines() if not line.startswith(DECODERS)]
    assert len(errors) == done.returncode, said
    if done.returncode:
        raise UserError(errors[0])


def make_whole(folder: Path) -> None:
    """code/, sample data and a checkpoint that fit together."""
    shutil.copytree(ROOT / "code", folder / "code")
    draw = [sys.executable, "make_sample_data.py", str(folder / "data"), "--train=2", "--val=1"]
    subprocess.run(draw, cwd=ROOT / "code", check=True, stdout=subprocess.DEVNULL)
    import student_code

    model = student_code.default_cnn_model(num_classes=CLASSES)
    content = {"state_dict": model.state_dict(), "epoch": 0, "kind": "torch_conv"}
    checkpoint.save(folder / "whole.pth.tar", content)


KINDS: dict[str, Callable] = {
    "labels": labels,
    "images": pictures,
    "checkpoints": checkpoints,
    "processes": processes,
}


# ---------------------------------------------------------------------------------------------
# Trying them
# ---------------------------------------------------------------------------------------------


def attempt(kind: str, seed: int, number: int, folder: Path) -> str:
    """'read', 'refused', or what went wrong."""
    try:
        KINDS[kind](random.Random(f"{seed} {kind} {number}"), folder)
    except UserError as e:
        return "refused" if len(str(e).strip().splitlines()) == 1 else f"several lines: {e}"
    except Exception:
        return traceback.format_exc()
    return "read"


def work(kind: str, seed: int, numbers: range, folder: Path, at, counts) -> None:
    """A process that tries cases; `at` tells which one it is at, in case it dies or hangs."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what decoders print
    for at.value in numbers:
        outcome = attempt(kind, seed, at.value, folder)
        if outcome == "read":
            counts[0] += 1
        elif outcome == "refused":
            counts[1] += 1
        else:
            print(f"FAILED --case {kind}:{at.value}\n{outcome}", flush=True)
            counts[2] += 1


def try_many(kind: str, seed: int, count: int, seconds: float, folder: Path) -> Counter:
    """Try `count` cases, or for `seconds`; a process that dies or hangs is replaced."""
    at = multiprocessing.Value(ctypes.c_long, -1, lock=False)
    counts = multiprocessing.Array(ctypes.c_long, 3, lock=False)
    patience = PATIENCE * (20 if kind == "processes" else 1)
    end, died = time.monotonic() + seconds, 0
    while at.value + 1 < count and time.monotonic() < end:
        arguments = (kind, seed, range(at.value + 1, count), folder, at, counts)
        process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
        process.start()
        since, told = time.monotonic(), at.value
        while process.is_alive() and time.monotonic() < end:
            process.join(1)
            if at.value != told:
                since, told = time.monotonic(), at.value
                print(f"\r{kind}: {told + 1}", end="", file=sys.stderr, flush=True)
            if time.monotonic() - since > patience:
                break
        over = time.monotonic() >= end
        if process.is_alive():
            process.kill()
        process.join()
        if process.exitcode != 0 and not over:
            died += 1
            print(f"FAILED --case {kind}:{at.value}: hang or crash, exit code {process.exitcode}")
    print(file=sys.stderr)
    return Counter(read=counts[0], refused=counts[1], failed=counts[2] + died)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, help="number of cases")
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", default="", metavar="KIND:NUMBER")
    args = parser.parse_args()
    torch.set_num_threads(1)
    Training(torch.optim.SGD)  # has torch import what it would import in every process
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a disk would be the slow part
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        folders = {kind: Path(scratch) / kind for kind in KINDS}
        for folder in folders.values():
            folder.mkdir()
        if args.case:
            kind, number = args.case.split(":")
            print(attempt(kind, args.seed, int(number), folders[kind]))
            return 0
        results = {}
        for kind in KINDS:
            count = 10**9 if args.seconds else getattr(args, kind)
            seconds = args.seconds / len(KINDS) or float("inf")
            results[kind] = try_many(kind, args.seed, count, seconds, folders[kind])
            print(f"{kind}: {dict(results[kind])}", flush=True)
    tell(results)
    return 1 if any(result["failed"] for result in results.values()) else 0


def tell(results: dict[str, Counter]) -> None:
    rows = [
        f"| {kind} | {r.total():,} | {r['read']:,} | {r['refused']:,} | {r['failed']} |"
        for kind, r in results.items()
    ]
    lines = [
        "Failed = another error than one clear line, a crash, a hang (20 s), a changed input file, "
        "a network half loaded, or code of the input that ran. Processes = main.py as a whole, "
        "whose one line may stand below one that a decoder printed by itself.",
        "",
        "| input | spoilt files | read | refused | failed |",
        "|---|---|---|---|---|",
        *rows,
        "",
        provenance(),
    ]
    write_section("reliability.md", "Spoilt input", "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
