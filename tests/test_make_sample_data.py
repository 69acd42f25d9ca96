"""The drawn data set: its layout, its reproducibility, and that colour does not give it away."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import make_sample_data
from custom_dataloader import MiniPlacesLoader, count_classes
from make_sample_data import SCENES
from utils import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sample"
    assert make_sample_data.make_sample_data(folder, train=24, val=10, seed=2024)
    return folder


def load(root, split):
    data = MiniPlacesLoader(root, num_classes=10, split=split)
    return np.stack([data[i][0] for i in range(len(data))]), np.array(data.labels)


def digest(root):
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_layout_is_that_of_miniplaces(root):
    assert count_classes(root) == 10
    train = MiniPlacesLoader(root, num_classes=10)
    names = {str(i): scene.__name__ for i, scene in enumerate(SCENES)}
    assert train.get_index_mapping() == names
    assert (root / "categories.txt").read_text().split("\n")[3] == "corridor 3"
    assert train.paths[0] == "train/b/beach/00000001.jpg"
    val = MiniPlacesLoader(root, num_classes=10, split="val")
    assert val.paths[-1] == "val/00000100.jpg"
    for split, count in ((train, 24), (val, 10)):
        assert np.bincount(split.labels).tolist() == [count] * 10
        images = [split[i][0] for i in range(len(split))]
        assert {image.shape for image in images} == {(128, 128, 3)}
        assert len({image.tobytes() for image in images}) == len(images)
    assert len(set(val.labels[:10])) > 4  # mixed: the first batch shows several categories


def test_the_seed_fixes_every_byte_and_a_longer_set_begins_alike(root, tmp_path):
    for name, train, seed in (("one", 2, 2024), ("same", 2, 2024), ("other", 2, 7)):
        make_sample_data.make_sample_data(tmp_path / name, train, 1, seed)
    one, same, other = (digest(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same
    images = [path for path in one if "train" in path and path.endswith(".jpg")]
    whole = digest(root)
    assert len(images) == 20
    assert all(one[path] == whole[path] != other[path] for path in images)


def test_mean_colour_does_not_tell_the_scene(root):
    """The nearest category mean, by colour and by contrast, does little better than chance."""
    (images, labels), (val_images, val_labels) = load(root, "train"), load(root, "val")

    def accuracy(features):
        x, v = features(images), features(val_images)
        means = np.stack([x[labels == c].mean(0) for c in range(10)])
        nearest = (((v[:, None] - means) / x.std(0)) ** 2).sum(-1).argmin(1)
        return (nearest == val_labels).mean()

    assert accuracy(lambda x: x.mean((1, 2))) < 0.3
    assert accuracy(lambda x: np.concatenate([x.mean((1, 2)), x.std((1, 2))], 1)) < 0.35


def test_a_small_network_learns_the_scenes(root):
    """Far above chance (10 %) in seconds, so there is something to see, and it is shape."""
    tensors = []
    for split in ("train", "val"):
        images, labels = load(root, split)
        grey = torch.from_numpy(images.mean(-1)).float()[:, None]
        grey = (grey - grey.mean((2, 3), keepdim=True)) / grey.std((2, 3), keepdim=True)
        tensors += [nn.functional.avg_pool2d(grey, 4), torch.from_numpy(labels)]
    x, y, val_x, val_y = tensors
    torch.manual_seed(0)
    net = nn.Sequential(
        *block(1, 16), *block(16, 32), *block(32, 64), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    ).append(nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(12):
        for batch in torch.randperm(len(x)).split(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        assert (net(val_x).argmax(1) == val_y).float().mean() > 0.6


def block(channels, width):
    conv = nn.Conv2d(channels, width, 3, 2, 1)
    return conv, nn.BatchNorm2d(width), nn.ReLU()


@pytest.fixture
def run(monkeypatch, capsys):
    """The command, in this process: (exit code or message, what it printed, what it complained)."""

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["make_sample_data.py", *map(str, args)])
        code = 0
        try:
            make_sample_data.main()
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return command


def test_the_command_twice(run, tmp_path):
    folder = tmp_path / "new" / "sample"
    first = run(folder, "--train", 2, "--val", 1, "--seed", 5)
    assert first == (0, f"{folder}: 10 categories of 2 + 1 images\n", "")
    before = digest(folder), (folder / "train.txt").stat().st_mtime_ns
    second = run(folder, "--train", 2, "--val", 1)
    assert second == (0, f"{folder} exists already; remove it to draw it again\n", "")
    assert (digest(folder), (folder / "train.txt").stat().st_mtime_ns) == before
    assert os.listdir(folder.parent) == ["sample"]


def test_a_folder_in_use_is_not_touched(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    error = f"error: {tmp_path} exists and is no data set; choose another folder, or remove it"
    assert run(tmp_path) == (error, "", "") and os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(UserError, match="cannot write"):
        make_sample_data.make_sample_data(tmp_path / "notes.txt" / "sample", 1, 1, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_half(tmp_path, how):
    folder = tmp_path / "sample"
    process = multiprocessing.get_context("fork").Process(
        target=make_sample_data.make_sample_data, args=(folder, 5000, 1, 1)
    )
    process.start()
    while not list(tmp_path.rglob("*.jpg")):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, how)
    process.join(60)
    assert process.exitcode != 0 and not folder.exists()
    assert make_sample_data.make_sample_data(folder, 1, 1, 1)  # nothing stands in the way
    if how == signal.SIGINT:
        assert os.listdir(tmp_path) == ["sample"]


@pytest.mark.parametrize("arguments", [["--train", "0"], ["--val", "x"], ["--seed", "-1"]])
def test_impossible_arguments(run, tmp_path, arguments):
    code, _, complaint = run(tmp_path / "sample", *arguments)
    assert code == 2 and f"error: argument {arguments[0]}: expected" in complaint
    assert os.listdir(tmp_path) == []
