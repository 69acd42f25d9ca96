"""Damaged, odd and missing input: works, or is one clear line, and never a wrong sample."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import main
from deepvision import checkpoint
from deepvision.data.loader import ResumableBatchSampler
from deepvision.models import registry
from deepvision.runtime import run_logger
from utils import load_image, save_image

CODE = Path(main.__file__).parent


# ---------------------------------------------------------------------------------------------
# Whole runs, with a small network
# ---------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Colours to scores; not a number for a black image."""

    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        mean = x.mean((2, 3))
        return self.fc(mean) + 0 * (mean.sum(1, keepdim=True) + 5).log()


@pytest.fixture
def data(sample_root, tmp_path):
    """A copy of the sample data to spoil."""
    return shutil.copytree(sample_root, tmp_path / "data")


@pytest.fixture
def logs(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.MODEL_REGISTRY, "torch_conv", Small)
    return tmp_path / "logs"


def run(capsys, logs, *words):
    """(exit code, lines of stdout, lines of stderr) of main.py in this process."""
    status = main.main([*map(str, words), "--gpu=-1", "-j=0", "-b=16", "--warmup=0"], logs)
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def training_images(data):
    return [line.split()[0] for line in (data / "train.txt").read_text().splitlines()]


def test_skipped_images_are_counted_listed_and_the_same_after_a_resume(data, logs, capsys):
    names = training_images(data)
    spoilt = [names[5], "val/" + os.listdir(data / "images" / "val")[0]]
    good = (data / "images" / spoilt[0]).read_bytes()
    for name in spoilt:
        (data / "images" / name).write_bytes(good[: len(good) // 2])
    status, _, err = run(capsys, logs, data, "--epochs=1")
    assert status == 1 and len(err) == 1 and spoilt[0] in err[0]
    shutil.rmtree(logs)

    status, out, err = run(capsys, logs, data, "--epochs=1", "--skip-bad-images")
    assert (status, err) == (0, [])
    assert {f"skipped: {name}" for name in spoilt} <= set(out)
    assert "2 images are skipped." in out
    [folder] = logs.iterdir()
    assert json.loads((folder / "config.json").read_text())["left_out"] == sorted(spoilt)

    (data / "images" / spoilt[0]).write_bytes(good)  # the resumed run does without it all the same
    last = folder / "models" / checkpoint.LAST
    status, out, _ = run(capsys, logs, data, "--epochs=2", f"--resume={last}")
    assert status == 0 and "2 images are skipped." in out
    assert checkpoint.load(last)["left_out"] == sorted(spoilt)


def test_a_run_that_a_bad_image_stopped_goes_on_without_it(data, logs, capsys):
    assert run(capsys, logs, data, "--epochs=1")[0] == 0
    bad = training_images(data)[5]
    (data / "images" / bad).write_bytes(b"")
    last = next(logs.iterdir()) / "models" / checkpoint.LAST
    assert run(capsys, logs, data, "--epochs=2", f"--resume={last}")[0] == 1
    status, out, _ = run(capsys, logs, data, "--epochs=2", f"--resume={last}", "--skip-bad-images")
    assert status == 0 and f"skipped: {bad}" in out
    assert checkpoint.load(last)["left_out"] == [bad]


def test_all_images_bad_is_an_error(data, logs, capsys):
    for name in training_images(data):
        (data / "images" / name).write_bytes(b"")
    status, _, err = run(capsys, logs, data, "--skip-bad-images")
    assert status == 1 and "no image that" in err[0] and not logs.exists()


def test_a_loss_that_is_not_finite_names_its_batch(data, logs, capsys):
    """Lines are printed at steps 0 and 10 alone; it happens between them."""
    names = training_images(data)
    order = ResumableBatchSampler(len(names), 16, 2024)
    black = order.indices(1, 3)[7]
    step = next(i for i in range(5) if black in order.indices(0, i))
    assert step > 0
    size = load_image(data / "images" / names[black]).shape
    save_image(data / "images" / names[black], np.zeros(size, np.uint8))
    status, _, err = run(capsys, logs, data, "--epochs=2", "--lr=0.01", "--save-every=1")
    assert status == 1 and len(err) == 1
    [folder] = logs.iterdir()
    batch = [names[i] for i in order.indices(0, step)]
    assert re.fullmatch(
        rf"error: the loss became nan in epoch 1, step {step + 1} of 5 \(learning rate 0\.0\d+\), "
        rf"on {batch[0]} and 15 more, listed in \S+/bad_batch\.txt; the last valid checkpoint is "
        rf"\S+/{checkpoint.LAST}: try a lower --lr",
        err[0],
    )
    assert (folder / "bad_batch.txt").read_text().splitlines() == batch
    content = checkpoint.load(folder / "models" / checkpoint.LAST)
    assert content["progress"]["position"] == step and not checkpoint.first_nonfinite(content)
    shutil.rmtree(logs)
    status, _, err = run(capsys, logs, data, "--epochs=2", "--lr=0.01")  # with no save before it
    assert status == 1 and f"step {step + 1} of 5" in err[0] and "none was saved" in err[0]


def test_weights_that_are_not_finite_are_not_saved(data, logs, capsys, monkeypatch):
    """The last step of an epoch spoils them; its loss is finite still."""
    step = torch.optim.SGD.step

    def spoil(optimizer, *args, **options):
        step(optimizer, *args, **options)
        spoil.steps += 1
        if spoil.steps == 10:
            optimizer.param_groups[0]["params"][0].data[0, 0] = torch.inf

    spoil.steps = 0
    monkeypatch.setattr(torch.optim.SGD, "step", spoil)
    status, _, err = run(capsys, logs, data, "--epochs=3", "--lr=0.01")
    assert status == 1 and "fc.weight is no longer finite in epoch 2, step 5 of 5" in err[0]
    [folder] = logs.iterdir()
    for file in (folder / "models").iterdir():
        content = checkpoint.load(file)
        assert content["epoch"] == 1 and not checkpoint.first_nonfinite(content)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


# ---------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A real file system of 512 kB, under logs/."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    folder = tmp_path / "logs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("where", ["events", "curves", "metrics", "checkpoint"])
def test_a_disk_that_fills_up_is_one_line(data, disk, logs, capsys, monkeypatch, where):
    """In mid-run, just before one of the files is written; saved files are intact."""
    owner, name = {
        "events": (run_logger.RunLogger, "log_step"),
        "curves": (run_logger.RunLogger, "add_scalar"),
        "metrics": (run_logger, "write_atomically"),
        "checkpoint": (checkpoint, "write_atomically"),
    }[where]
    original = getattr(owner, name)

    def fill_first(*args, **options):
        if any(disk.glob(f"*/models/{checkpoint.LAST}")):
            with open(disk / "filler", "wb") as f:
                while True:
                    try:
                        os.write(f.fileno(), bytes(512))
                    except OSError:
                        break
        return original(*args, **options)

    monkeypatch.setattr(owner, name, fill_first)
    status, _, err = run(capsys, logs, data, "--epochs=3", "--lr=0.01", "-p=1")
    assert status == 1 and len(err) == 1
    assert re.fullmatch(r"error: cannot write \S+: No space left on device(; .* intact)?", err[0])
    [last] = disk.glob(f"*/models/{checkpoint.LAST}")
    assert checkpoint.load(last)["epoch"] == 1
    (disk / "filler").unlink()
    monkeypatch.undo()
    monkeypatch.setitem(registry.MODEL_REGISTRY, "torch_conv", Small)
    assert run(capsys, logs, data, "--epochs=3", "--lr=0.01", "--resume=auto")[0] == 0


def test_a_folder_name_that_is_too_long_is_one_line(logs, capsys):
    status, _, err = run(capsys, logs, "x" * 5000)
    assert status == 1 and len(err) == 1 and err[0].startswith("error: there is no folder xxx")


def test_logs_that_cannot_be_written_are_one_line(data, disk, logs, capsys):
    run(capsys, logs, data, "--epochs=1", "--lr=0.01")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    before = sorted(disk.rglob("*"))
    for words in (["--epochs=1"], ["--epochs=2", "--resume=auto"]):
        status, _, err = run(capsys, logs, data, *words)
        assert status == 1 and len(err) == 1
        assert re.match(r"error: cannot (make|write) .*: Read-only file system", err[0])
    assert sorted(disk.rglob("*")) == before


def test_a_folder_that_becomes_read_only_in_mid_run(data, disk, logs, capsys, monkeypatch):
    """Between two saves; saved files are intact."""
    original = checkpoint.write_atomically

    def lock_first(path, *args, **options):
        if path.exists():
            mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(path.parent)]
            subprocess.run(mount, check=True)
        return original(path, *args, **options)

    monkeypatch.setattr(checkpoint, "write_atomically", lock_first)
    status, _, err = run(capsys, logs, data, "--epochs=3", "--lr=0.01", "--save-every=2")
    [models] = disk.glob("*/models")
    subprocess.run(["umount", str(models)], check=True)
    assert status == 1 and err == [
        f"error: cannot write {models / checkpoint.LAST}: Read-only file system; "
        "the old content is intact"
    ]
    assert checkpoint.load(models / checkpoint.LAST)["progress"]["position"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_an_output_that_cannot_be_written_is_one_line(data, logs, capsys, monkeypatch):
    """As with `> logs/output.txt` on a full disk, or after `| head`."""
    monkeypatch.setattr(sys, "stdout", full := open("/dev/full", "w"))  # noqa: SIM115
    status = main.main(
        [str(data), "--epochs=1", "--gpu=-1", "-j=0", "-b=16", "--save-every=1"], logs
    )
    with contextlib.suppress(OSError):
        full.close()
    told = "cannot write the output: {}; saved files are intact\n".format
    assert status == 1 and capsys.readouterr().err == "error: " + told("No space left on device")
    ours, theirs = os.pipe()
    os.close(ours)
    words = [sys.executable, "main.py", str(data), "--check-data", "-j=0"]
    done = subprocess.run(words, cwd=CODE, stdout=theirs, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: " + told("Broken pipe"))


def test_logs_that_are_a_file_are_one_line(data, logs, capsys):
    logs.write_text("")
    status, _, err = run(capsys, logs, data, "--epochs=1")
    assert status == 1 and re.match("error: cannot make the run folder .*: Not a directory", err[0])


# ---------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------


@pytest.fixture(params=multiprocessing.get_all_start_methods())
def tree(request, tmp_path):
    """A copy of code/ in which main.py's workers start by this method."""
    code = shutil.copytree(CODE, tmp_path / "code")
    start = f"import multiprocessing; multiprocessing.set_start_method({request.param!r})\n"
    (code / "sitecustomize.py").write_text(start)
    return code


def command(tree, root):
    return {
        "args": [sys.executable, "main.py", str(root), "--gpu=-1", "-j=1", "-b=16", "-p=1"],
        "cwd": tree,
        "env": {**os.environ, "PYTHONPATH": str(tree)},
    }


DEAD = (
    r"(ERROR: Unexpected bus error .*\n\0?)?"  # written by a worker of torch 2.6 as it dies
    r"error: a process that loads images died \((memory may have run out, or )?/dev/shm is full\): "
    r"use -j 0, or --cache=device on a GPU; Docker gives /dev/shm more with --shm-size=8g\n"
)


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [n for child in map(int, children) for n in (child, *descendants(child))]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_worker_that_dies_is_one_line(tree, sample_root):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(**command(tree, sample_root), **pipes)
    while "Epoch: [1][1/" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(descendants(process.pid)[-1], signal.SIGKILL)  # after any fork server and tracker
    begun = time.monotonic()
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and time.monotonic() - begun < 60
    assert re.fullmatch(DEAD, err)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_a_full_dev_shm_is_one_line(tree, sample_root):
    """In a separate mount namespace, where /dev/shm holds less than one batch."""
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    namespace = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a file system")
    run = command(tree, sample_root)
    run["args"] = [*namespace, *run["args"]]
    done = subprocess.run(**run, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and re.fullmatch(DEAD, done.stderr), done.stderr
