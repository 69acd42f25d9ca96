"""Images: order, held-out slice, cache."""

from __future__ import annotations

import numpy as np
import torch
from reverse_toys import CLASSES, TRAIN

from reverse_attack.data import list_images


def test_images_come_shuffled_once_held_out_never_trained_on_and_from_the_cache(root):
    listing = list_images("cifar10", root, "train")
    train_set, held_out = listing.split(seed=1)
    assert len(held_out) == round(0.04 * CLASSES * TRAIN)
    assert len(train_set) + len(held_out) == CLASSES * TRAIN
    assert not torch.equal(train_set.y, train_set.y.sort().values)
    again, same = list_images("cifar10", root, "train").split(seed=2)
    assert torch.equal(held_out.x, same.x)
    assert not torch.equal(train_set.x, again.x)
    seen = {image.numpy().tobytes() for image in train_set.x}
    assert not seen & {image.numpy().tobytes() for image in held_out.x}
    (cache,) = (root / "cache").glob("cifar10-train-*.npy")
    stored = np.load(cache)
    stored[:] = 7  # what the cache says is what is read, until a file changes
    np.save(cache, stored)
    assert (list_images("cifar10", root, "train").split(1)[0].x == 7).all()
    listing.paths[0].touch()
    assert not (list_images("cifar10", root, "train").split(1)[0].x == 7).all()
