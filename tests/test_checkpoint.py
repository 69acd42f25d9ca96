"""Checkpoints: whole or not at all, safe to open, checked before anything changes."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
from utils import UserError

CODE = Path(checkpoint.__file__).parent


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    checkpoint.save(path, {"epoch": 2, "state_dict": network().state_dict(), "best_acc1": 50.0})
    return path


def test_what_was_saved_comes_back(saved):
    content = checkpoint.load(saved)
    assert (content["epoch"], content["best_acc1"]) == (2, 50.0)
    for key, value in network().state_dict().items():
        assert torch.equal(content["state_dict"][key], value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped(tmp_path, prefix):
    weights = network().state_dict()
    checkpoint.save(tmp_path / "x", {"state_dict": {prefix + k: v for k, v in weights.items()}})
    assert list(checkpoint.load(tmp_path / "x")["state_dict"]) == list(weights)


def test_numpy_numbers_of_old_files_load(tmp_path):
    content = {"state_dict": {}, "best_acc1": np.float64(43.6), "epoch": np.int64(60)}
    torch.save(content, tmp_path / "x")
    progress, lost = checkpoint.progress_of(checkpoint.load(tmp_path / "x"), 256)
    assert (progress.best_acc1, progress.epoch, lost) == (43.6, 60, None)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path, legacy):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    content = {"state_dict": {}, "trap": Trap()}
    torch.save(content, tmp_path / "x", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"refused to load .*mkdir, which could run code"):
        checkpoint.load(tmp_path / "x")
    assert not (tmp_path / "trapped").exists()


def test_truncated_files_are_called_damaged(saved):
    whole = saved.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        saved.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged or no checkpoint"):
            checkpoint.load(saved)


def test_a_flipped_bit_in_the_weights_is_noticed(saved):
    whole = bytearray(saved.read_bytes())
    weight = network().state_dict()["0.weight"].numpy().tobytes()
    whole[whole.index(weight) + 5] ^= 1
    saved.write_bytes(whole)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 1}, {"state_dict": 3}, {"state_dict": {"a": "text"}}]
)
def test_something_else_saved_by_torch_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "x")
    with pytest.raises(UserError, match="no 'state_dict'"):
        checkpoint.load(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"<html></html>", pickle.dumps({"a": 1}), b"\x80\x02."])
def test_no_file_of_torch_is_no_checkpoint(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=r"x"):
        checkpoint.load(tmp_path / "x")
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "missing")


def test_weights_that_do_not_fit_leave_the_network_untouched():
    model, weights = network(0), network(1).state_dict()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    del weights["0.bias"]
    weights["1.weight"], weights["extra"] = torch.ones(7), torch.ones(1)
    with pytest.raises(UserError) as refusal:
        checkpoint.load_weights(model, {"state_dict": weights}, "x")
    for part in ("0.bias is missing", "extra is not part", "1.weight is (7,) in the file and (3,)"):
        assert part in str(refusal.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_reported(value):
    weights = network(1).state_dict()
    weights["0.weight"][1, 2] = value
    with pytest.raises(UserError, match=r"not finite .*0\.weight"):
        checkpoint.load_weights(network(), {"state_dict": weights}, "x")


def test_momentum_comes_back_and_the_command_line_sets_the_rates():
    model = network()
    old = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    model(torch.randn(8, 4)).square().sum().backward()
    old.step()
    new = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.8)
    assert checkpoint.load_optimizer(new, {"optimizer": old.state_dict()}) is None
    assert (new.param_groups[0]["lr"], new.param_groups[0]["momentum"]) == (0.2, 0.8)
    for p in model.parameters():
        assert torch.equal(new.state[p]["momentum_buffer"], old.state[p]["momentum_buffer"])
    assert "starts at zero" in checkpoint.load_optimizer(new, {})
    other = torch.optim.SGD([torch.ones(1)], lr=1).state_dict()
    assert "another optimizer" in checkpoint.load_optimizer(new, {"optimizer": other})


@pytest.fixture
def full_disk(tmp_path):
    """A real file system of 256 kB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(full_disk):
    path = full_disk / "checkpoint.pth.tar"
    checkpoint.save(path, {"state_dict": {"a": torch.zeros(100)}})
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"No space left on device; what was there is intact"):
        checkpoint.save(path, {"state_dict": {"a": torch.zeros(200_000)}})
    assert path.read_bytes() == before
    assert os.listdir(full_disk) == [path.name]


WRITER = """
import sys, torch, checkpoint
from pathlib import Path
for i in range(10_000):
    checkpoint.save(Path(sys.argv[1]), {"state_dict": {"a": torch.full((50_000,), float(i))}})
    if i == 0:
        print("started", flush=True)
"""


@pytest.mark.parametrize("delay", [0.01, 0.037, 0.11])
def test_killed_while_writing_leaves_a_whole_file(tmp_path, delay):
    path = tmp_path / "checkpoint.pth.tar"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], cwd=CODE, stdout=subprocess.PIPE
    )
    writer.stdout.readline()
    time.sleep(delay)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    values = checkpoint.load(path)["state_dict"]["a"]
    assert (values == values[0]).all() and len(values) == 50_000


@pytest.mark.parametrize(
    ("text", "expected"), [("10m", (600, True)), ("30s", (30, True)), ("200", (200, False))]
)
def test_intervals(text, expected):
    assert checkpoint.parse_interval(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "1h", "1.5m", "m", "10 m"])
def test_what_is_no_interval(text):
    with pytest.raises(ValueError, match="not an interval"):
        checkpoint.parse_interval(text)


def test_the_first_signal_asks_and_the_second_acts():
    with checkpoint.SavePoint("1000") as point:
        assert not point.due()
        os.kill(os.getpid(), signal.SIGINT)
        assert point.due() and point.stopped_by == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_save_is_due_every_n_steps():
    point = checkpoint.SavePoint("3")
    due = []
    for _ in range(7):
        due.append(point.due())
        if due[-1]:
            point.saved()
    assert due == [False, False, True, False, False, True, False]
