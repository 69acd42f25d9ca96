"""Part IV: class folders, held-out images, the file of decoded images, augmentation."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from reverse_attack import data
from reverse_attack.data import AugmentedBatches, Images, list_images
from utils import UserError, save_image

SIDE = 8


def fill(root, split, *classes, count=25):
    """Images of noise in class folders."""
    for number, name in enumerate(classes):
        folder = root / "cifar10" / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng((number, i))
            save_image(folder / f"{i:02}.png", rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    return root


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path, "train", "bird", "cat")


def test_held_out_images_are_never_trained_on_and_the_same_for_every_seed(root):
    train, held_out = list_images("cifar10", root, "train").split(seed=1)
    assert (len(train), len(held_out)) == (48, 2) and train.x.shape[1:] == (3, SIDE, SIDE)
    assert not torch.equal(train.y, train.y.sort().values)
    again, same = list_images("cifar10", root, "train").split(seed=2)
    assert torch.equal(held_out.x, same.x) and not torch.equal(train.x, again.x)
    seen = {image.numpy().tobytes() for image in train.x}
    assert not seen & {image.numpy().tobytes() for image in held_out.x}


def test_decoded_images_are_read_from_their_file_until_a_source_changes(root):
    def first():
        return list_images("cifar10", root, "train").read(torch.arange(40)).x

    decoded = first()
    (file,) = root.glob("cifar10-train.decoded-*")
    np.full(50 * SIDE * SIDE * 3, 7, np.uint8).tofile(file)
    assert (first() == 7).all()
    os.utime(root / "cifar10" / "train" / "cat" / "03.png", ns=(1, 1))
    assert torch.equal(first(), decoded)
    assert len([*root.glob("cifar10-train.decoded-*")]) == 1  # the stale file is deleted


def test_few_images_are_decoded_without_a_file(root):
    images = list_images("cifar10", root, "train").sample(0, limit=4)
    assert len(images) == 4 and not [*root.glob("*.decoded*")]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are POSIX's")
def test_a_folder_that_cannot_be_written_only_costs_time(root, capsys):
    (root / "cifar10-train.decoded.lock").mkdir()
    assert len(list_images("cifar10", root, "train").sample(0)) == 50
    assert "Decoded images are not kept: cannot write" in capsys.readouterr().out


def test_hidden_and_system_files_are_neither_classes_nor_images(root):
    expected = list_images("cifar10", root, "train")
    (root / "cifar10/train/.ipynb_checkpoints").mkdir()
    (root / "cifar10/train/.ipynb_checkpoints/1.png").write_bytes(b"x")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._00.png"):
        (root / "cifar10/train" / name).write_bytes(b"x")
        (root / "cifar10/train/cat" / name).write_bytes(b"x")
    index = list_images("cifar10", root, "train")
    assert index.classes == ["bird", "cat"] and index.paths == expected.paths
    assert index.y.tolist() == [0] * 25 + [1] * 25


@pytest.mark.parametrize("split", ["train", "test"])
def test_train_and_test_must_have_the_same_classes(tmp_path, split):
    fill(tmp_path, "train", "airplane", "bird", count=1)
    fill(tmp_path, "test", "Bird", "airplane", count=1)  # sorted, Bird would be class 0
    with pytest.raises(UserError, match="have different classes: Bird, bird;"):
        list_images("cifar10", tmp_path, split)


def test_empty_folders_are_named(tmp_path):
    (tmp_path / "cifar10" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="cifar10/train has no class folders"):
        list_images("cifar10", tmp_path, "train")
    (tmp_path / "cifar10" / "train" / "cat").mkdir()
    with pytest.raises(UserError, match="cifar10/train/cat has no images"):
        list_images("cifar10", tmp_path, "train")


def test_images_of_several_sizes_are_refused_by_name(root):
    save_image(root / "cifar10/train/cat/03.png", np.zeros((SIDE, 9, 3), np.uint8))
    with pytest.raises(UserError, match=f"cat/03.png has 9×{SIDE} pixels and the first image"):
        list_images("cifar10", root, "train").sample(0)


def test_each_epoch_shows_every_image_once_shifted_or_mirrored():
    x = torch.arange(10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16) + 100
    batches = AugmentedBatches(Images(x.contiguous(), torch.arange(10), []), 5, seed=1)
    for x_batch, y in batches:
        levels = x_batch.amax((1, 2, 3)) * 255
        assert torch.allclose(levels, 100.0 + y)  # shifted over black by at most 2 of 16
        assert ((x_batch == 0).float().mean((1, 2, 3)) <= 1 - (14 / 16) ** 2 + 1e-6).all()
    orders = []
    for batches.epoch in (0, 1, 0):
        orders.append(torch.cat([y for _, y in batches]).tolist())
    assert sorted(orders[0]) == [*range(10)] and orders[0] == orders[2] != orders[1]


def test_an_images_augmentation_follows_from_seed_epoch_and_index(root):
    """Not from the batch that it lands in."""
    images = list_images("cifar10", root, "train").sample(0)
    images.y = torch.arange(len(images))

    def augmented(size, seed=3, epoch=1):
        batches = AugmentedBatches(images, size, seed)
        batches.epoch = epoch
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        return x[y.argsort()]

    assert torch.equal(augmented(5), augmented(25))
    assert not torch.equal(augmented(5), augmented(5, seed=4))
    assert not torch.equal(augmented(5), augmented(5, epoch=2))


def test_shift_and_flip_against_slices():
    x = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    shifts, flips = torch.tensor([[2, 2], [0, 4], [3, 1]]), torch.tensor([False, False, True])
    out = data.shift_and_flip(x, shifts, flips)
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[1, :, 2:, :-2], x[1, :, :-2, 2:]) and not out[1, :, :2].any()
    assert torch.equal(out[2].flip(2)[:, :-1, 1:], x[2, :, 1:, :-1])
