"""Batches: reproducible, the same under every start method; errors cross processes as one line."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_dataset import AUGMENT, VAL, make_root

from custom_dataloader import MiniPlacesLoader
from deepvision.data.device_augment import AugmentParams
from deepvision.data.loader import (
    ResumableBatchSampler,
    SeededDataset,
    training_batches,
    uniform_table,
    validation_batches,
)
from utils import UserError

ROOT = Path(__file__).resolve().parents[2]
METHODS = multiprocessing.get_all_start_methods()


@pytest.fixture(params=METHODS)
def start_method(request):
    """Workers start as on Linux until Python 3.13, as from 3.14 on, as on macOS and Windows."""
    previous = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(previous, force=True)


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path / "data", train=24, val=7)


# --- batches --------------------------------------------------------------------------------


def test_each_epoch_is_a_permutation_without_the_last_partial_batch():
    sampler = ResumableBatchSampler(23, 5, seed=1)
    orders = []
    for epoch in range(3):
        sampler.set_position(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 4 and all(len(b) == 5 for b in batches)
        assert {e for b in batches for e, _ in b} == {epoch}
        orders.append([i for b in batches for _, i in b])
        assert len(set(orders[-1])) == 20 and set(orders[-1]) <= set(range(23))
        assert [sampler.indices(epoch, b) for b in range(4)] == [[i for _, i in b] for b in batches]
    assert orders[0] != orders[1] != orders[2]
    other = ResumableBatchSampler(23, 5, seed=2)
    assert [i for b in other for _, i in b] != orders[0]


def test_an_epoch_can_start_at_any_batch():
    sampler = ResumableBatchSampler(40, 4, seed=3)
    sampler.set_position(6)
    whole = list(sampler)
    for start in (0, 1, 7, 10):
        sampler.set_position(6, start)
        assert list(sampler) == whole[start:] and len(sampler) == 10


class NoisyTransform:
    """A student's own: draws from NumPy and torch, not from `random`."""

    def __call__(self, img):
        noise = np.random.rand() + torch.rand(1).item() + random.random()  # noqa: NPY002
        return torch.full((3, 2, 2), noise) + img.mean() / 255


def collect(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("transform", [AUGMENT, NoisyTransform()], ids=["ours", "a student's"])
def test_samples_do_not_depend_on_the_workers(root, transform):
    data = MiniPlacesLoader(root, transforms=transform)
    runs = []
    for workers in (0, 1, 2):
        loader = training_batches(data, 6, 2024, workers)
        random.seed(workers)
        torch.manual_seed(workers)
        loader.batch_sampler.set_position(2)
        runs.append(collect(loader))
    for images, labels in runs[1:]:
        assert torch.equal(images, runs[0][0]) and torch.equal(labels, runs[0][1])


def test_a_resumed_epoch_goes_on_with_the_same_samples(root):
    data = MiniPlacesLoader(root, transforms=AUGMENT)
    loader = training_batches(data, 4, 1, workers=2)
    epochs = {}
    for epoch in (0, 1):
        loader.batch_sampler.set_position(epoch)
        epochs[epoch] = list(loader)
    resumed = training_batches(data, 4, 1, workers=1)
    resumed.batch_sampler.set_position(1, 4)
    rest = list(resumed)
    assert len(rest) == 2
    assert torch.equal(collect(rest)[0], collect(epochs[1][4:])[0])
    first, second = (samples_by_index(loader, e, batches) for e, batches in epochs.items())
    assert not any(torch.equal(first[i], second[i]) for i in range(24))  # augmented again


def samples_by_index(loader, epoch, batches):
    return {
        index: image
        for b, (images, _) in enumerate(batches)
        for index, image in zip(loader.batch_sampler.indices(epoch, b), images, strict=True)
    }


def test_an_epoch_left_early_does_not_leak_into_the_next(root):
    data = MiniPlacesLoader(root, transforms=VAL)
    loader = training_batches(data, 4, 1, workers=1)
    loader.batch_sampler.set_position(0)
    expected = list(loader)
    next(iter(loader))
    assert torch.equal(collect(loader)[0], collect(expected)[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_trainers_own_random_numbers_are_left_alone(root, workers):
    """Dropout draws from them between batches: a resumed run must find them as they were."""
    data = MiniPlacesLoader(root, transforms=NoisyTransform())
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    for loader in (training_batches(data, 4, 1, workers), validation_batches(data, workers)):
        for _ in loader:
            assert random.getstate() == before[0]
            assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
            assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_written_in_place_holds_the_bits_of_its_samples(root, workers):
    """And separate memory: a batch that is kept does not change when the next ones come."""
    keep, apart = (MiniPlacesLoader(root, transforms=VAL) for _ in range(2))
    apart.transforms = VAL.__call__  # has no shape: collated sample by sample
    loader = training_batches(keep, 4, 1, workers)
    whole = list(loader)
    pieces = list(training_batches(apart, 4, 1, workers))
    assert len(whole) == 6 and keep.image_shape == (128, 128, 3) and apart.image_shape is None
    assert torch.equal(collect(whole)[0], collect(pieces)[0])
    assert torch.equal(collect(whole)[1], collect(pieces)[1])
    (written, _), _ = next(loader._start_pass())  # a quarter of the floats
    assert written.dtype == torch.uint8 and written.is_shared() == (workers > 0)
    assert whole[0][0].is_contiguous(memory_format=torch.channels_last)


def test_an_augmentation_follows_from_seed_epoch_and_index_alone(root):
    """Whatever the batch: its size, its other images, its place in the epoch."""
    data, found = MiniPlacesLoader(root, transforms=AUGMENT), {}
    for batch_size in (1, 4, 24):
        loader = training_batches(data, batch_size, 1, 0)
        loader.batch_sampler.set_position(5)
        found[batch_size] = samples_by_index(loader, 5, loader)
    for i in range(24):
        assert torch.equal(found[1][i], found[4][i]) and torch.equal(found[1][i], found[24][i])
    other = training_batches(data, 24, 2, 0)
    other.batch_sampler.set_position(5)
    assert not any(
        torch.equal(image, found[1][i]) for i, image in samples_by_index(other, 5, other).items()
    )


def test_rows_of_the_tables_draw_unlike_numbers():
    """Of one epoch, of two, of two seeds, and unlike the numbers that order the epoch."""
    tables = [uniform_table(*key, 3000, 5) for key in ((1, 0), (1, 1), (2, 0))]
    order = np.random.default_rng((1, 0)).random((3000, 5), np.float32)
    columns = np.concatenate([*tables, order, np.roll(tables[0], 1, axis=0)], axis=1).T
    assert np.abs(np.corrcoef(columns) - np.eye(25)).max() < 0.09
    assert np.abs(columns.mean(1) - 0.5).max() < 0.03 and 0 <= columns.min() < columns.max() < 1


def test_a_batch_of_augmentations_is_drawn_within_a_millisecond():
    params, u = AugmentParams(AUGMENT, (128, 128, 3)), uniform_table(1, 0, 256, AUGMENT.draws)
    out, seconds = np.empty((256, *params.shape), np.float32), []
    for _ in range(30):
        start = time.perf_counter()
        params.write(range(256), out, u)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3


def test_neighbouring_samples_draw_unlike_numbers():
    class Draws:
        def __len__(self):
            return 500

        def __getitem__(self, index):
            third = torch.rand(1, dtype=torch.float64).item()
            return random.random(), np.random.rand(), third  # noqa: NPY002

    keys = [(epoch, index) for epoch in (0, 1, 10) for index in range(500)]
    draws = np.array(SeededDataset(Draws(), seed=1).__getitems__(keys)[0])
    assert len(np.unique(draws)) == draws.size
    assert np.abs(draws.mean(0) - 0.5).max() < 0.03
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.1
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.1
    assert not np.isin(draws, SeededDataset(Draws(), seed=2).__getitems__(keys)[0]).any()


def test_validation_is_in_order_and_whole(tmp_path):
    root = make_root(tmp_path / "data", train=1, val=203)
    data = MiniPlacesLoader(root, split="val", transforms=lambda img: torch.tensor(img.mean()))
    batches = list(validation_batches(data, workers=0))
    assert [len(labels) for _, labels in batches] == [100, 100, 3]
    images, labels = collect(batches)
    assert labels.tolist() == data.labels
    assert images.tolist() == [data[i][0].item() for i in range(203)]


def test_validation_repeats_even_transforms_that_draw(root):
    data = MiniPlacesLoader(root, split="val", transforms=NoisyTransform())
    loader = validation_batches(data, workers=1)
    assert torch.equal(collect(loader)[0], collect(loader)[0])
    assert torch.equal(collect(loader)[0], collect(validation_batches(data, 0))[0])


# --- errors ---------------------------------------------------------------------------------


def test_too_few_images_for_one_batch(root):
    with pytest.raises(UserError) as error:
        training_batches(MiniPlacesLoader(root), 25, 1, 0)
    message = "24 training images do not fill one batch of 25; use -b 24 or less"
    assert str(error.value) == message
    assert len(training_batches(MiniPlacesLoader(root), 24, 1, 0)) == 1


def bad_root(root):
    """A web page in place of an image, in the fourth of six training batches at the latest."""
    data = MiniPlacesLoader(root, transforms=VAL)
    bad = data.image_folder / data.paths[13]
    bad.write_bytes(b"<html>quota exceeded</html>")
    return data, bad


def test_a_bad_image_is_one_line_with_its_name(root):
    data, bad = bad_root(root)
    with pytest.raises(UserError, match=f"^cannot read the image {bad}: it is damaged or not an i"):
        list(training_batches(data, 4, 1, workers=0))
    bad.unlink()
    with pytest.raises(UserError, match=f"^cannot read the image {bad}: No such file"):
        list(validation_batches(data, workers=0))


def test_samples_and_errors_are_the_same_under_every_start_method(root, start_method):
    data = MiniPlacesLoader(root, transforms=AUGMENT)
    expected = collect(training_batches(data, 6, 2024, 0))
    assert all(map(torch.equal, collect(training_batches(data, 6, 2024, 2)), expected))
    data, bad = bad_root(root)
    with pytest.raises(UserError, match=f"^cannot read the image {bad}: it is damaged or not an i"):
        list(training_batches(data, 4, 1, workers=1))


def test_a_bad_image_ends_the_workers_at_once(root):
    """Not when the cycle of an error and its frame is collected: torch then waits 5 s."""
    data, bad = bad_root(root)
    gc.disable()
    try:
        with pytest.raises(UserError, match=f"^cannot read the image {bad}"):
            list(training_batches(data, 4, 1, workers=1))
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_a_damaged_image_is_reported_once(root, capfd):
    data = MiniPlacesLoader(root, transforms=VAL)
    bad = data.image_folder / data.paths[13]
    jpeg = bytearray(bad.read_bytes())
    jpeg[-400:-200] = bytes(200)
    bad.write_bytes(jpeg)
    for workers in (0, 2):
        loader = training_batches(data, 4, 1, workers)
        for epoch in range(2):
            loader.batch_sampler.set_position(epoch)
            assert len(list(loader)) == 6
        line, end = capfd.readouterr().err.split("\n")
        assert line.startswith(f"warning: the image {bad} is damaged: Corrupt JPEG") and not end


def test_a_students_warnings_are_shown(root):
    with pytest.warns(UserWarning, match="mine"):
        list(training_batches(MiniPlacesLoader(root, transforms=warn), 4, 1, 0))


def warn(img):
    warnings.warn("mine", stacklevel=1)
    return torch.zeros(1)


def test_a_bug_in_a_students_transform_keeps_its_traceback(root):
    data = MiniPlacesLoader(root, transforms=broken)
    with pytest.raises(ZeroDivisionError, match="in broken"):
        list(training_batches(data, 4, 1, workers=1))


def broken(img):
    return 1 / 0


@pytest.mark.parametrize("start_method", ["spawn"], indirect=True)
def test_transforms_that_cannot_travel_to_workers_are_one_line(root, start_method):
    data = MiniPlacesLoader(root, transforms=lambda img: torch.zeros(1))
    with pytest.raises(UserError, match="cannot be sent to other processes .*lambda.*or use -j 0"):
        list(training_batches(data, 4, 1, workers=1))


# --- signals --------------------------------------------------------------------------------


@pytest.mark.parametrize("unblock", [False, True])
def test_a_worker_leaves_signals_to_the_trainer(root, unblock):
    """A terminal or a cluster sends them to every process; the current batch must still arrive.

    Libraries unblock SIGTERM: Python's own does where it starts its resource tracker.
    """
    data = MiniPlacesLoader(root, transforms=partial(interrupted, unblock=unblock))
    images, _ = collect(training_batches(data, 4, 1, workers=1))
    assert len(images) == 24


def interrupted(img, unblock):
    if unblock and hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    return torch.zeros(1)


TRAINER = """
import multiprocessing, os, signal, sys, time
from custom_dataloader import MiniPlacesLoader
from deepvision.data.loader import training_batches
from small_dataset import VAL

if __name__ == "__main__":
    method, end, root = sys.argv[1:]
    multiprocessing.set_start_method(method)
    signal.signal(signal.SIGINT, lambda *_: None)
    batches = training_batches(MiniPlacesLoader(root, transforms=VAL), 4, 1, workers=2)
    epoch = iter(batches)
    print("starting", flush=True)
    next(epoch)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print(len(list(epoch)), flush=True)
"""


def start_trainer(tmp_path, *words):
    """A process group of a trainer and two workers."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    path = os.pathsep.join([str(ROOT / "code"), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "trainer.py", *map(str, words)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs Linux")
@pytest.mark.parametrize("method", METHODS)
def test_signals_while_workers_start_reach_the_trainer_alone(root, tmp_path, method):
    """They import for seconds under forkserver and spawn."""
    trainer = start_trainer(tmp_path, method, "exit", root)
    assert trainer.stdout.readline() == "starting\n"
    started = threading.Event()

    def interrupt():
        while not started.wait(0.05):
            os.killpg(trainer.pid, signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    workers = trainer.stdout.readline().split()
    started.set()
    sender.join()
    rest, err = trainer.communicate(timeout=100)
    assert trainer.returncode == 0, err
    assert len(workers) == 2 and rest.splitlines()[-1] == "5"


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs Linux")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("end", "seconds"), [("kill", 15), ("exit", 4)])
def test_workers_end_with_their_trainer(root, tmp_path, method, end, seconds):
    """Killed, they notice within torch's 5 seconds; at its regular end, it terminates them."""
    trainer = start_trainer(tmp_path, method, end, root)
    assert trainer.stdout.readline() == "starting\n"
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    trainer.wait(100)
    assert trainer.returncode == (0 if end == "exit" else -signal.SIGKILL)
    deadline = time.monotonic() + seconds
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    trainer.communicate()
