"""Decoded images in RAM, in a file, on the device: the same samples, never stale ones."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import re
import shutil
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from custom_dataloader import MiniPlacesLoader
from custom_transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Compose,
    Denormalize,
    Scale,
    ToTensor,
)
from deepvision.data import cache, decoded
from deepvision.data.device_augment import DeviceImages
from deepvision.data.loader import fixed_subset_batch, training_batches, validation_batches
from student_code import get_train_transforms, get_val_transforms
from utils import UserError, save_image

CPU = torch.device("cpu")


@pytest.fixture
def root(sample_root, tmp_path):
    return shutil.copytree(sample_root, tmp_path / "data")


def cached(root, place, split="train", transforms=None, workers=0):
    dataset = MiniPlacesLoader(root, split=split, transforms=transforms)
    cache.enable_cache(dataset, place, workers, CPU)
    return dataset


def epoch_of(dataset, workers, epoch=3):
    loader = training_batches(dataset, 16, 2024, workers)
    loader.batch_sampler.set_position(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def files(root):
    return sorted(path.name for path in root.glob("train.decoded*"))


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_samples_are_those_of_no_cache(root, place):
    plain = epoch_of(cached(root, "none", transforms=get_train_transforms()), 0)
    dataset = cached(root, place, transforms=get_train_transforms(), workers=1)
    for workers in (0, 2):
        images, labels = epoch_of(dataset, workers)
        assert torch.equal(images, plain[0]) and torch.equal(labels, plain[1])


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_a_transform_may_write_into_its_image(root, place):
    dataset = cached(root, place)
    before = dataset[3][0].copy()
    dataset[3][0].fill(0)
    assert np.array_equal(dataset[3][0], before)


def test_a_file_travels_to_workers_by_name(root):
    read = cached(root, "disk").read
    assert len(pickle.dumps(read)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(read))(5), read(5))


# --- the file on disk -------------------------------------------------------------------------


def test_the_file_is_used_again(root):
    cached(root, "disk")
    [path] = root.glob("train.decoded-*")
    made = path.stat().st_mtime_ns
    image = np.fromfile(path, np.uint8)
    image[:] = 7  # shows that pixels come from the file
    image.tofile(path)
    os.utime(path, ns=(made, made))
    assert (cached(root, "disk")[0][0] == 7).all()
    assert path.stat().st_mtime_ns == made


def black(root, name):
    save_image(root / "images" / name, np.zeros((128, 128, 3), np.uint8))


def touch(root, name):
    os.utime(root / "images" / name, ns=(1, 1))


def drop_from_list(root, name):
    lines = (root / "train.txt").read_text().splitlines(keepends=True)
    (root / "train.txt").write_text("".join(line for line in lines if name not in line))


def cut_the_cache(root, name):
    [path] = root.glob("train.decoded-*")
    os.truncate(path, 1000)


@pytest.mark.parametrize("change", [black, touch, drop_from_list, cut_the_cache])
def test_a_stale_file_is_replaced(root, change):
    old = cached(root, "disk")
    first, name = files(root), old.paths[4]
    del old
    change(root, name)
    new = cached(root, "disk")
    assert len(files(root)) == 2  # one file and its lock
    assert (files(root) == first) == (change is cut_the_cache)
    plain = cached(root, "none")
    assert new.paths == plain.paths
    assert all(np.array_equal(new[i][0], plain[i][0]) for i in range(len(plain)))


def test_two_runs_that_start_together_make_one_file(root):
    fork = multiprocessing.get_context("fork")
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
    runs = [fork.Process(target=cache_and_report, args=(root, theirs)) for _, theirs in pipes]
    for run in runs:
        run.start()
    reports = [ours.recv() for ours, _ in pipes]
    for run in runs:
        run.join()
    assert sorted(built for built, _ in reports) == [False, True]
    assert reports[0][1] == reports[1][1] == cached(root, "none")[9][0].tobytes()
    assert len(files(root)) == 2


def cache_and_report(root, pipe):
    built, build = [], decoded._build

    def slowly(*arguments):
        built.append(True)
        time.sleep(0.5)
        build(*arguments)

    decoded._build = slowly
    image = cached(root, "disk")[9][0]
    pipe.send((bool(built), image.tobytes()))


@pytest.mark.skipif(decoded.fcntl is None, reason="Windows deletes no file")
def test_a_file_that_a_run_uses_is_not_deleted_by_another(root):
    first = cached(root, "disk")
    drop_from_list(root, first.paths[4])
    second = cached(root, "disk")  # with another list: its own file
    assert len(files(root)) == 3
    worker = pickle.loads(pickle.dumps(first.read))  # a spawned worker opens the file later
    assert np.array_equal(worker(5), first.read(5))
    del first, second, worker
    drop_from_list(root, MiniPlacesLoader(root).paths[4])
    cached(root, "disk")
    assert len(files(root)) == 2


def test_what_a_killed_build_left_goes_away(root):
    (root / "train.decoded-0123.456.part").write_bytes(b"half")
    cached(root, "disk")
    assert not any(name.endswith(".part") for name in files(root))


def test_a_bad_image_leaves_no_file(root):
    dataset = MiniPlacesLoader(root)
    (root / "images" / dataset.paths[20]).write_bytes(b"<html>")
    for place in ("ram", "disk", "device"):
        dataset = MiniPlacesLoader(root, transforms=get_val_transforms())
        with pytest.raises(UserError, match=f"cannot read the image .*{dataset.paths[20]}: it is"):
            cache.enable_cache(dataset, place, 1, CPU)
    assert files(root) == ["train.decoded.lock"]


def test_images_of_several_sizes_are_refused_by_name(root):
    name = MiniPlacesLoader(root).paths[7]
    save_image(root / "images" / name, np.zeros((60, 90, 3), np.uint8))
    line = (
        f"{name} has 90×60 pixels and the first image 128×128: "
        "--cache and reverse_attack need images of one size"
    )
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        cached(root, "disk", workers=1)


def test_a_folder_that_cannot_be_written_is_one_line(root):
    (root / "train.decoded.lock").mkdir()
    with pytest.raises(UserError, match="--cache=disk: cannot write .*: Is a directory; --cache=r"):
        cached(root, "disk")


def test_what_does_not_fit_is_refused(root, monkeypatch, capsys):
    monkeypatch.setattr(cache, "free_memory", lambda device: 1000)
    for place in ("ram", "device"):
        with pytest.raises(UserError, match=r"take \d+\.\d\d GB and (ram|cpu) has 0\.00 GB free"):
            cached(root, place, transforms=get_train_transforms())
    usage = shutil.disk_usage(root)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"0\.00 GB are needed, 0\.00 GB are free; --cache=ram"):
        cached(root, "disk")
    assert not [name for name in files(root) if "decoded-" in name]


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_ram_is_shared_with_workers_under_every_start_method(root, method):
    """Not copied: what is written after the workers started is what they read."""
    dataset = cached(root, "ram")
    context = multiprocessing.get_context(method)
    barrier = context.Barrier(2)
    loader = DataLoader(
        Late(dataset.read, barrier), num_workers=1, multiprocessing_context=context, batch_size=None
    )
    images = iter(loader)
    dataset.read.__self__.images.fill_(9)
    barrier.wait(100)
    assert all((image == 9).all() for image in images)


class Late(Dataset):
    """Reads when both processes have reached the barrier."""

    def __init__(self, read, barrier):
        self.read, self.barrier = read, barrier

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index == 0:
            self.barrier.wait(100)
        return self.read(index)


# --- auto -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "epochs", "nbytes", "free", "place"),
    [
        ("cuda", 60, 10, 30, "device"),
        ("cuda", 60, 10, 29, "none"),  # more than a third
        ("cuda", 2, 10, 30, "device"),
        ("cuda", 1, 10, 30, "none"),
        ("cuda", 0, 10, 30, "none"),  # an evaluation
        ("cpu", 60, 10, 30, "none"),
        ("mps", 60, 10, 30, "none"),
    ],
)
def test_auto_is_the_gpu_where_it_pays_and_has_room(device, epochs, nbytes, free, place):
    assert cache.choose_cache(device, epochs, nbytes, free) == place


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CPU stands for a GPU on which auto chooses the device."""
    choose = cache.choose_cache
    monkeypatch.setattr(cache, "choose_cache", lambda _, *rest: choose("cuda", *rest))
    return monkeypatch


def enable(root, place, strict=True, epochs=2, transforms=None):
    sets = [
        MiniPlacesLoader(root, split="train", transforms=transforms or get_train_transforms()),
        MiniPlacesLoader(root, split="val", transforms=get_val_transforms()),
    ]
    return cache.enable_caches(sets, place, 0, CPU, epochs, strict), sets


def test_auto_caches_both_sets(root, as_on_a_gpu, capsys):
    place, sets = enable(root, "auto")
    assert place == "device" and all(isinstance(s.transforms, DeviceImages) for s in sets)
    assert capsys.readouterr().out.count("images take") == 2


def test_auto_leaves_alone_what_the_device_cannot_do(root, as_on_a_gpu, capsys):
    place, (train, val) = enable(root, "auto", transforms=Compose([Scale(144), ToTensor()]))
    assert place == "none" and train[0][0].shape == (3, 144, 144)
    assert "The train images are not cached: --cache=device supports" in capsys.readouterr().out
    name = train.paths[7]
    save_image(root / "images" / name, np.zeros((60, 90, 3), np.uint8))
    assert enable(root, "auto")[0] == "none"
    assert f"not cached: {name} has 90×60 pixels" in capsys.readouterr().out
    (root / "images" / train.paths[0]).write_bytes(b"<html>")
    assert enable(root, "auto")[0] == "none"
    assert "not cached: cannot read the image" in capsys.readouterr().out


def test_auto_without_memory_is_a_line(root, as_on_a_gpu, capsys):
    as_on_a_gpu.setattr(cache, "free_memory", lambda device: 10**7)
    assert enable(root, "auto")[0] == "none"
    assert "not cached: 0.01 GB is more than a third of the 0.01 GB" in capsys.readouterr().out


def test_a_named_cache_raises_and_a_restored_one_does_not(root, monkeypatch, capsys):
    monkeypatch.setattr(cache, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match="GB free: use --cache=none"):
        enable(root, "device")
    assert enable(root, "device", strict=False)[0] == "none"
    assert capsys.readouterr().out.count("images are not cached") == 2


def test_memory_that_is_gone_meanwhile_is_the_same_error(root, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match=r"take 0.00 GB and ram has 0.00 GB free"):
        cached(root, "ram")


# --- the device -------------------------------------------------------------------------------


def grey_levels(images):
    """Normalised images back in 0..255."""
    return 255 * Denormalize(IMAGENET_MEAN, IMAGENET_STD)(images)


def test_the_device_draws_the_same_pictures(root):
    """Same crop, angle, flip and gains for each (seed, epoch, index); bilinear up to rounding."""
    plain, labels = epoch_of(cached(root, "none", transforms=get_train_transforms()), 0)
    dataset = cached(root, "device", transforms=get_train_transforms())
    for workers in (0, 1):
        images, same_labels = epoch_of(dataset, workers)
        apart = (grey_levels(images) - grey_levels(plain)).abs()
        assert torch.equal(labels, same_labels)
        assert apart.mean() < 0.3 and (apart > 2.01).float().mean() < 1e-3


def test_the_devices_validation_is_within_one_grey_level(root):
    transforms = get_val_transforms()
    images = [
        torch.cat([x for x, _ in validation_batches(dataset, 0)])
        for dataset in (
            cached(root, "none", "val", transforms),
            cached(root, "device", "val", transforms),
        )
    ]
    apart = (grey_levels(images[0]) - grey_levels(images[1])).abs()
    assert apart.max() < 1.01 and apart.mean() < 0.2


def test_the_held_out_batch_comes_from_the_device_too(root):
    transforms = get_val_transforms()
    plain, on_device = (
        fixed_subset_batch(cached(root, place, "val", transforms), 5)
        for place in ("none", "device")
    )
    assert torch.equal(plain[1], on_device[1])
    assert (grey_levels(plain[0]) - grey_levels(on_device[0])).abs().max() < 1.01


def test_developing_images_does_not_wait_for_the_device():
    """Memory on "meta" holds nothing: to read from it fails, so does mixing it with the CPU's."""
    images = torch.empty(5, 8, 9, 3, dtype=torch.uint8, device="meta")
    params = DeviceImages(images, get_train_transforms())
    batch = torch.empty(4, *params.shape)
    params.write(range(4), batch.numpy(), np.random.default_rng(0).random((4, params.draws)))
    x = params.finish(batch, CPU)  # the loader of a few images is on the CPU
    assert x.device.type == "meta" and x.shape == (4, 3, 128, 128)


def test_the_device_spoils_nothing_and_repeats_itself(root):
    dataset = cached(root, "device", transforms=get_train_transforms())
    random.seed(1)
    first = epoch_of(dataset, 0)[0]
    assert torch.equal(first, epoch_of(dataset, 0)[0])
    assert not torch.equal(first, epoch_of(dataset, 0, epoch=4)[0])


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (Compose([Scale(144), ToTensor()]), "supports the course's transforms only"),
        (None, "supports the course's transforms only"),
        (get_val_transforms(), "scales bilinearly and at most"),
    ],
)
def test_what_the_device_cannot_do_is_refused(root, transforms, message):
    if "scales" in message:
        transforms.transforms[0] = Scale(40)
    with pytest.raises(UserError, match=f"--cache=device {message}.*use --cache=ram"):
        cached(root, "device", transforms=transforms)


def test_a_device_that_cannot_warp_images_is_one_line():
    cache.check_sampling(torch.device("cpu"))

    class Lacks(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "grid_sampler" in str(func):
                raise NotImplementedError(f"{func} is not implemented")
            return func(*args, **(kwargs or {}))

    with Lacks(), pytest.raises(UserError, match="cannot warp images on cpu: install a newer one"):
        cache.check_sampling(torch.device("cpu"))
