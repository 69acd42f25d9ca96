"""The data set and its loaders: label files, reproducibility, errors that cross processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from custom_dataloader import MiniPlacesLoader, count_classes
from custom_transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    Compose,
    Normalize,
    RandomColor,
    RandomHorizontalFlip,
    RandomRotate,
    RandomSizedCrop,
    Scale,
    ToTensor,
)
from deepvision.data.loader import (
    ResumableBatchSampler,
    SeededDataset,
    training_batches,
    validation_batches,
)
from utils import UserError, save_image

NORMALIZE = Normalize(IMAGENET_MEAN, IMAGENET_STD)
AUGMENT = Compose(
    [
        Scale(144),
        RandomHorizontalFlip(),
        RandomColor(0.15),
        RandomRotate(15),
        RandomSizedCrop(128),
        ToTensor(),
        NORMALIZE,
    ]
)
VAL = Compose([Scale(144), CenterCrop(128), ToTensor(), NORMALIZE])
CATEGORIES = ["abbey", "bakery/shop", "coast"]


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path / "data", train=24, val=7)


def make_root(root, train, val):
    """A folder in the MiniPlaces layout; image i is 64 x 64 noise of seed i."""
    for split, count in (("train", train), ("val", val)):
        rows = []
        for i in range(count):
            label = i % len(CATEGORIES)
            name = CATEGORIES[label]
            path = f"train/{name[0]}/{name}/{i:08d}.jpg" if split == "train" else f"val/{i:08d}.jpg"
            target = root / "images" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            save_image(target, noise)
            rows.append(f"{path} {label}\n")
        (root / f"{split}.txt").write_text("".join(rows))
    return root


# --- the data set ---------------------------------------------------------------------------


def test_samples_labels_and_names(root):
    data = MiniPlacesLoader(root, num_classes=3)
    assert len(data) == 24 and data.labels[:4] == [0, 1, 2, 0]
    assert data.paths[1] == "train/b/bakery/shop/00000001.jpg"
    image, label = data[4]
    noise = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert label == 1 and image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert np.corrcoef(image.ravel(), noise.ravel())[0, 1] > 0.4  # JPEG is unkind to noise
    names = {"0": "abbey", "1": "bakery/shop", "2": "coast"}
    assert data.get_index_mapping() == names
    assert MiniPlacesLoader(str(root), split="val").get_index_mapping() == names
    assert count_classes(root) == 3
    tensor, _ = MiniPlacesLoader(root, split="val", transforms=VAL)[0]
    assert tensor.shape == (3, 128, 128)


def test_the_largest_label_may_stand_in_val(root):
    (root / "val.txt").write_text("val/00000000.jpg 41\n")
    assert count_classes(root) == 42
    (root / "val.txt").unlink()
    assert count_classes(root) == 3


def test_a_plain_torch_loader_works(root):
    """The course's own driver, and students', use torch's DataLoader."""
    data = MiniPlacesLoader(root, split="train", transforms=AUGMENT)
    images, labels = next(iter(DataLoader(data, 8, shuffle=True, num_workers=1)))
    assert images.shape == (8, 3, 128, 128) and labels.dtype == torch.int64


def test_images_or_the_root_may_be_linked(root, tmp_path):
    shutil.move(root / "images", tmp_path / "elsewhere")
    (root / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "linked").symlink_to(root)
    assert MiniPlacesLoader(tmp_path / "linked")[0][0].shape == (64, 64, 3)


def test_a_label_file_elsewhere(root, tmp_path):
    (tmp_path / "few.txt").write_text("train/c/coast/00000002.jpg 7\n")
    data = MiniPlacesLoader(root, tmp_path / "few.txt", num_classes=8)
    assert data.labels == [7] and data.get_index_mapping() == {"7": "coast"}


def test_bom_crlf_blank_lines_and_spaces_are_fine(root):
    text = "\ufeff\r\nval/00000000.jpg 0\r\n\r\n  val/00000001.jpg\t 2  \r\nval/my photo.jpg 1"
    (root / "val.txt").write_bytes(text.encode())
    data = MiniPlacesLoader(root, split="val")
    assert data.paths == ["val/00000000.jpg", "val/00000001.jpg", "val/my photo.jpg"]
    assert data.labels == [0, 2, 1]


BAD_LINES = {
    "val/0.jpg": "line 3: expected 'path label', got 'val/0.jpg'",
    "7": "line 3: expected 'path label', got '7'",
    "val/0.jpg abbey": "line 3: expected 'path label', got 'val/0.jpg abbey'",
    "val/0.jpg 1.0": "line 3: expected 'path label', got 'val/0.jpg 1.0'",
    "val/0.jpg -1": "line 3: expected 'path label', got 'val/0.jpg -1'",
    "val/0.jpg 1_0": "line 3: expected 'path label', got 'val/0.jpg 1_0'",
    "val/0.jpg ٣": "line 3: expected 'path label', got 'val/0.jpg ٣'",
    "val/0.jpg 100": "line 3: label 100 is not in 0..99",
    "val/0.jpg " + "9" * 5000: f"line 3: label {'9' * 20} is not in 0..99",
    "../secret.jpg 0": "line 3: '../secret.jpg' is not a plain path below the image folder",
    "val/../../x.jpg 0": "line 3: 'val/../../x.jpg' is not a plain path below the image folder",
    "/etc/passwd 0": "line 3: '/etc/passwd' is not a plain path below the image folder",
    "C:/x.jpg 0": "line 3: 'C:/x.jpg' is not a plain path below the image folder",
    "val\\0.jpg 0": r"line 3: 'val\\0.jpg' is not a plain path below the image folder",
    "val//0.jpg 0": "line 3: 'val//0.jpg' is not a plain path below the image folder",
    "./val/0.jpg 0": "line 3: './val/0.jpg' is not a plain path below the image folder",
    "val/\0.jpg 0": r"line 3: 'val/\x00.jpg' is not a plain path below the image folder",
    "val/a.jpg 1": "line 3: val/a.jpg is listed already, in line 1",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=[m[:45] for m in BAD_LINES.values()])
def test_a_bad_line_is_named(root, line):
    (root / "val.txt").write_bytes(f"val/a.jpg 0\n\n{line}\nval/b.jpg 0\n".encode())
    with pytest.raises(UserError) as error:
        MiniPlacesLoader(root, split="val")
    assert str(error.value) == f"{root / 'val.txt'}, {BAD_LINES[line]}"


def test_bytes_that_are_no_text(root):
    (root / "train.txt").write_bytes(b"train/a.jpg 0\nval/\xff\xfe.jpg 0\n")
    with pytest.raises(UserError, match="line 2: this is not UTF-8 text$"):
        count_classes(root)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60) | st.text("val/.jpg 0123\r\n\t:\\\ufeff", max_size=60))
def test_any_label_file_is_read_or_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz" / "train.txt"
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    try:
        loader = MiniPlacesLoader(path.parent, num_classes=9)
    except UserError as e:
        assert "\n" not in str(e) and str(path) in str(e)
    else:
        assert len(set(loader.paths)) == len(loader.labels) > 0
        inside = loader.image_folder.resolve()
        assert all(inside in (inside / p).resolve().parents for p in loader.paths)
        assert all(0 <= label < 9 for label in loader.labels)


def test_what_is_missing_is_said_in_one_line(root, tmp_path):
    def message(*args, **kwargs):
        with pytest.raises(UserError) as error:
            MiniPlacesLoader(*args, **kwargs)
        return str(error.value)

    get = "get the images with: sh download_dataset.sh"
    assert message(tmp_path / "no") == f"there is no folder {tmp_path / 'no'}; {get}"
    assert message(root, split="test") == f"there is no label file {root / 'test.txt'}; {get}"
    assert "the split is train, val or test; got 'trian'" in message(root, split="trian")
    (root / "train.txt").write_text("\n \n")
    assert message(root) == f"{root / 'train.txt'} lists no images; {get}"
    shutil.rmtree(root / "images")
    assert message(root) == f"there is no folder {root / 'images'}; {get}"


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
    assert not any(torch.equal(first[i], second[i]) for i in range(24))  # augmented afresh


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
    """And memory of its own: a batch that is kept does not change when the next ones come."""
    keep, apart = (MiniPlacesLoader(root, transforms=AUGMENT) for _ in range(2))
    apart.transforms = lambda img: AUGMENT(img)  # tells no shape: collated sample by sample
    whole = list(training_batches(keep, 4, 1, workers))
    pieces = list(training_batches(apart, 4, 1, workers))
    assert len(whole) == 6 and keep.image_shape == (3, 128, 128) and apart.image_shape is None
    assert torch.equal(collect(whole)[0], collect(pieces)[0])
    assert torch.equal(collect(whole)[1], collect(pieces)[1])
    assert whole[0][0].is_shared() == (workers > 0)


def test_neighbouring_samples_draw_unlike_numbers():
    class Draws:
        def __len__(self):
            return 500

        def __getitem__(self, index):
            third = torch.rand(1, dtype=torch.float64).item()
            return random.random(), np.random.rand(), third  # noqa: NPY002

    keys = [(epoch, index) for epoch in (0, 1, 10) for index in range(500)]
    draws = np.array(SeededDataset(Draws(), seed=1).__getitems__(keys))
    assert len(np.unique(draws)) == draws.size
    assert np.abs(draws.mean(0) - 0.5).max() < 0.03
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.1
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.1
    assert not np.isin(draws, SeededDataset(Draws(), seed=2).__getitems__(keys)).any()


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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_line_with_its_name(root, workers):
    data = MiniPlacesLoader(root, transforms=VAL)
    bad = data.image_folder / data.paths[13]
    bad.write_bytes(b"<html>quota exceeded</html>")
    loader = training_batches(data, 4, 1, workers)
    with pytest.raises(UserError) as error:
        list(loader)
    assert str(error.value) == f"cannot read the image {bad}: it is damaged or not an image"
    bad.unlink()
    with pytest.raises(UserError, match=f"cannot read the image .*{bad.name}: No such file"):
        list(validation_batches(data, workers))


def test_a_bug_in_a_students_transform_keeps_its_traceback(root):
    data = MiniPlacesLoader(root, transforms=broken)
    with pytest.raises(ZeroDivisionError, match="in broken"):
        list(training_batches(data, 4, 1, workers=1))


def broken(img):
    return 1 / 0


@pytest.mark.parametrize("unblock", [False, True])
def test_a_worker_leaves_signals_to_the_trainer(root, unblock):
    """A terminal or a cluster sends them to every process; the batch in work must still arrive.

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


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs Linux")
@pytest.mark.parametrize(("last_words", "seconds"), [("kill", 12), ("exit", 4)])
def test_workers_end_with_their_trainer(root, last_words, seconds):
    """Killed, they notice within torch's 5 seconds; left at its end, they are told at once."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")
    trainer = fork.Process(target=die_amid_an_epoch, args=(root, theirs, last_words))
    trainer.start()
    theirs.close()
    assert ours.recv() == 2
    trainer.join()
    assert ours.poll(seconds)
    with pytest.raises(EOFError):  # the last process that held the other end is gone
        ours.recv()


def die_amid_an_epoch(root, pipe, last_words):
    batches = training_batches(MiniPlacesLoader(root, transforms=VAL), 4, 1, workers=2)
    next(iter(batches))
    pipe.send(len(multiprocessing.active_children()))
    if last_words == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
