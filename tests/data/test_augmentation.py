"""The training augmentation's settings: sizes by epoch, areas of crops, angles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from custom_dataloader import MiniPlacesLoader
from custom_transforms import Compose, Scale, ToTensor
from deepvision.data.augmentation import adapt_augmentation, parse_resolution, sizes_by_epoch
from deepvision.data.cache import enable_cache
from deepvision.data.loader import training_batches
from student_code import get_train_transforms
from utils import UserError


def train_set(root: Path, transforms=None) -> MiniPlacesLoader:
    return MiniPlacesLoader(root, transforms=transforms or get_train_transforms())


def test_a_schedule_is_read_as_it_is_documented():
    schedule = parse_resolution("96:0.6,112:0.85,128")
    assert schedule == [(96, 0.6), (112, 0.85), (128, 1.0)]
    assert sizes_by_epoch(schedule, 13) == [96] * 8 + [112] * 3 + [128] * 2
    assert sizes_by_epoch(schedule, 1) == [96]
    assert sizes_by_epoch(parse_resolution("128"), 3) == [128] * 3


@pytest.mark.parametrize("wrong", ["", "96:0.6", "96,128", "96:0.6,112:0.5,128", "96:1,128", "8"])
def test_other_schedules_are_refused(wrong):
    with pytest.raises(ValueError):
        parse_resolution(wrong)


@pytest.mark.parametrize(("cache", "workers"), [("none", 0), ("ram", 1), ("device", 1)])
def test_workers_follow_the_epoch_that_a_batch_is_of(sample_root, cache, workers):
    dataset = train_set(sample_root)
    adapt_augmentation(dataset, [96, 96, 128], 0.35, 0.0)
    enable_cache(dataset, cache, workers, torch.device("cpu"))
    loader = training_batches(dataset, 8, seed=1, workers=workers)
    sides = []
    for epoch in (0, 2, 1, 7):  # a run starts at any epoch
        loader.batch_sampler.set_position(epoch)
        sides += [next(iter(loader))[0].shape[-1]]
    assert sides == [96, 128, 96, 128]


def test_the_course_settings_draw_the_course_images(sample_root):
    plain, adapted = train_set(sample_root), train_set(sample_root)
    adapt_augmentation(adapted, [128], 0.25, 15.0)
    batches = [next(iter(training_batches(d, 8, seed=1, workers=0))) for d in (plain, adapted)]
    assert torch.equal(batches[0][0], batches[1][0])


def test_area_and_angle_reach_the_transforms(sample_root):
    dataset = train_set(sample_root)
    adapt_augmentation(dataset, [64], 0.9, 0.0)
    rotate, crop = dataset.transforms.transforms[3:5]
    u = np.random.default_rng(0).random((crop.draws, 99))
    assert (rotate.sample(u) == 0).all()
    _, _, width, height = crop.sample(u, 100, 100)
    assert (width * height >= 8900).all()


def test_other_transforms_than_the_courses_are_left_alone(sample_root):
    transforms = Compose([Scale(64), ToTensor()])
    with pytest.raises(UserError, match="--resolution=128 --crop-area=0.25 --rotation=15"):
        adapt_augmentation(train_set(sample_root, transforms), [96], 0.25, 15.0)
    assert len(transforms.transforms) == 2
