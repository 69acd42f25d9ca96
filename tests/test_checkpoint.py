"""Checkpoints: whole or not at all, safe to open, checked before anything changes."""

import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deepvision import checkpoint
from deepvision.runtime import atomic
from deepvision.training.progress import Progress
from utils import UserError


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
    progress = Progress()
    assert progress.load_state_dict(checkpoint.load(tmp_path / "x")) is None
    assert (progress.best_acc1, progress.epoch) == (43.6, 60)


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


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><title>Quota exceeded</title>", "a web page"),
        (b"\x1f\x8b\x08" + bytes(99), "gzip-compressed"),
        (b'{"kind": "vit"}', "a JSON file"),
        (bytes(200_000), "filled with zeros"),
        (b"", "empty"),
    ],
)
def test_other_files_are_named(tmp_path, data, words):
    (tmp_path / "x.pth.tar").write_bytes(data)
    with pytest.raises(UserError, match=f"x.pth.tar is no checkpoint: it is .*{words}"):
        checkpoint.load(tmp_path / "x.pth.tar")


def test_a_run_folder_means_its_checkpoint(tmp_path):
    assert checkpoint.locate(str(tmp_path)) == tmp_path / "models" / checkpoint.LAST
    assert checkpoint.locate(str(tmp_path), checkpoint.BEST).name == checkpoint.BEST
    assert checkpoint.locate("~/x").is_absolute()


def test_truncated_files_are_called_damaged(saved):
    whole = saved.read_bytes()
    for length in [*range(1, len(whole), len(whole) // 40), len(whole) - 1]:
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
    with pytest.raises(UserError, match=r"No space left on device; the old content is intact"):
        checkpoint.save(path, {"state_dict": {"a": torch.zeros(200_000)}})
    assert path.read_bytes() == before
    assert os.listdir(full_disk) == [path.name]


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")


def in_a_child(work):
    """Start `work` in a copy of this process; return its id."""
    if child := os.fork():
        return child
    try:
        work()
    finally:
        os._exit(0)


def told_to_a_user(work):
    """The UserError that `work` ends with for an ordinary user: root may do everything."""
    ours, theirs = os.pipe()

    def tell():
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            work()
        except UserError as e:
            os.write(theirs, str(e).encode())

    os.waitpid(in_a_child(tell), 0)
    os.close(theirs)
    with open(ours) as pipe:
        return pipe.read()


@forks
def test_a_folder_that_lost_its_permission_keeps_its_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a user could not walk down to it
    for value in (1, 2):
        write(tmp_path, value)
    tmp_path.chmod(0o555)
    assert told_to_a_user(lambda: write(Path(), 3)) == (
        "cannot write checkpoint.pth.tar: Permission denied; the old content is intact"
    )
    assert [value_of(Path(name)) for name in (checkpoint.LAST, checkpoint.PREVIOUS)] == [2, 1]
    assert len(os.listdir()) == 2


@forks
def test_a_file_that_one_may_not_read_is_named(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    saved.parent.chmod(0o755)
    saved.chmod(0)
    assert told_to_a_user(partial(checkpoint.load, saved.name)) == (
        f"cannot read {saved.name}: Permission denied"
    )
    saved.parent.chmod(0)
    assert told_to_a_user(partial(checkpoint.load, saved.name)) == f"no checkpoint at {saved.name}"
    saved.parent.chmod(0o755)


def test_a_name_too_long_for_a_file_is_no_checkpoint():
    with pytest.raises(UserError, match="no checkpoint at x"):
        checkpoint.load("x" * 5000)


@forks
@pytest.mark.parametrize("delay", [0.01, 0.037, 0.11])
def test_killed_while_writing_leaves_a_whole_file(tmp_path, delay):
    path = tmp_path / "checkpoint.pth.tar"

    def keep_writing():
        for i in range(10_000):
            checkpoint.save(path, {"state_dict": {"a": torch.full((50_000,), float(i))}})

    child = in_a_child(keep_writing)
    while not path.exists():
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    values = checkpoint.load(path)["state_dict"]["a"]
    assert (values == values[0]).all() and len(values) == 50_000


def value_of(path):
    return checkpoint.load(path)["state_dict"]["a"].item()


def write(folder, value):
    content = {"state_dict": {"a": torch.tensor(float(value))}}
    checkpoint.save(folder / checkpoint.LAST, content, folder / checkpoint.PREVIOUS)


def test_the_checkpoint_before_is_kept(tmp_path):
    write(tmp_path, 1)
    assert os.listdir(tmp_path) == [checkpoint.LAST]
    write(tmp_path, 2)
    write(tmp_path, 3)
    assert value_of(tmp_path / checkpoint.LAST) == 3
    assert value_of(tmp_path / checkpoint.PREVIOUS) == 2
    assert sorted(os.listdir(tmp_path)) == sorted([checkpoint.LAST, checkpoint.PREVIOUS])


@pytest.mark.parametrize("name", [checkpoint.LAST, checkpoint.BEST])
def test_a_damaged_checkpoint_names_the_one_before(tmp_path, name):
    for value in (1, 2):
        write(tmp_path, value)
    good = checkpoint.PREVIOUS if name == checkpoint.LAST else checkpoint.LAST
    (tmp_path / name).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=rf"damaged.*this one is valid: --resume=.*{good}$"):
        checkpoint.load(tmp_path / name)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"no checkpoint at.*this one is valid: .*{good}$"):
        checkpoint.load(tmp_path / name)


STEPS = {  # of a save: (function, the file that it is called on), and whether the new file is there
    "before the sync": (os, "fsync", None, False),
    "before the link": (os, "link", checkpoint.LAST, False),
    "before the rename": (os, "replace", checkpoint.LAST + ".part", False),
    "before the old file's rename": (os, "replace", checkpoint.LAST + ".old", True),
    "before the folder's sync": (atomic, "_sync_folder", None, True),
}


def die_before(monkeypatch, owner, name, file):
    """Have this process killed when it calls the function on this file, or on any."""
    original = getattr(owner, name)

    def call(first, *args, **options):
        if file is None or Path(first).name == file:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(first, *args, **options)

    monkeypatch.setattr(owner, name, call)


@forks
@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_killed_between_any_two_steps_of_a_save_leaves_a_valid_file(
    tmp_path, monkeypatch, step, damaged
):
    """With a damaged last file too, which must not replace the valid one before."""
    for value in (1, 2):
        write(tmp_path, value)
    if damaged:
        (tmp_path / checkpoint.LAST).write_bytes(b"damaged")
    *where, renamed = STEPS[step]
    with monkeypatch.context() as patch:
        die_before(patch, *where)
        child = in_a_child(lambda: write(tmp_path, 3))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert value_of(checkpoint.latest_valid(tmp_path)) == (3 if renamed else 1 if damaged else 2)
    write(tmp_path, 4)  # what the kill left behind is no obstacle
    assert sorted(os.listdir(tmp_path)) == sorted([checkpoint.LAST, checkpoint.PREVIOUS])


def test_what_is_not_finite_is_found_in_weights_and_moments():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    content = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    assert checkpoint.first_nonfinite(content) is None
    optimizer.state[model[0].bias]["exp_avg"][1] = float("inf")
    assert checkpoint.first_nonfinite({**content, "optimizer": optimizer.state_dict()}) == (
        "moment exp_avg of 1"
    )
    model[1].running_var[0] = float("nan")
    assert "running_var" in checkpoint.first_nonfinite({"state_dict": model.state_dict()})


def test_restored_momentum_takes_the_layout_of_its_parameter():
    """The course's is in another; the fused steps of a GPU refuse to mix them."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    momentum = torch.randn(4, 3, 3, 3), torch.randn(4)
    state = {i: {"momentum_buffer": value} for i, value in enumerate(momentum)}
    saved = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    assert checkpoint.load_optimizer(optimizer, {"optimizer": saved}) is None
    for parameter, value in zip(model.parameters(), momentum, strict=True):
        restored = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(restored, value) and restored.stride() == parameter.stride()


@pytest.mark.parametrize(
    "state",
    [
        {0: {"momentum_buffer": torch.zeros(9)}},
        {0: {"exp_avg": torch.zeros(3, 4)}},
        {99: {"momentum_buffer": torch.zeros(3, 4)}},
        {0: {"momentum_buffer": torch.full((3, 4), torch.nan)}},
        {0: 5},
        [1],
    ],
    ids=lambda s: str(s)[:30],
)
def test_a_foreign_optimizer_state_is_left_out(state):
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9)
    saved = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    assert "another optimizer's" in checkpoint.load_optimizer(optimizer, {"optimizer": saved})
    assert not optimizer.state_dict()["state"]


def test_the_scale_of_gradients_is_restored_or_refused():
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    weight = torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler.scale(weight * 1.0).backward()
    scaler.step(optimizer)
    scaler.update()
    saved = {"scaler": scaler.state_dict()}
    fresh = torch.amp.GradScaler("cpu")
    checkpoint.load_scaler(fresh, saved)
    assert fresh.state_dict() == scaler.state_dict() and fresh.get_scale() == 4096
    for wrong in (
        [1],
        torch.zeros(3),
        {"scale": 1.0},
        {"scale": float("nan"), "_growth_tracker": 0},
        {"scale": 1.0, "_growth_tracker": 2**31},
    ):
        with pytest.raises(UserError, match="the checkpoint's scaler is invalid"):
            checkpoint.load_scaler(fresh, {"scaler": wrong})
    checkpoint.load_scaler(fresh, {})
    assert fresh.get_scale() == 4096
