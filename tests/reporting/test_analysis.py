"""Predictions, confusion, parameters and FLOPs against brute force."""

import math

import numpy as np
import pytest
import torch
from report_runs import make_network
from torch import nn

import student_code
from custom_dataloader import MiniPlacesLoader
from deepvision.reporting import analysis, records
from deepvision.reporting.analysis import Predictions
from utils import UserError, load_image

NAMES = ["beach", "bridge", "city", "corridor", "desert", "field", "forest"]


@pytest.fixture(scope="module")
def predictions():
    rng = np.random.default_rng(3)
    labels, predicted = rng.integers(0, 6, (2, 300))  # class 6 has no image
    return Predictions(labels, predicted, rng.random(300), NAMES)


def pairs_of(p):
    return list(zip(p.labels.tolist(), p.predictions.tolist(), strict=True))


def test_confusion_and_class_accuracy(predictions):
    counts, pairs = predictions.confusion, pairs_of(predictions)
    for i in range(7):
        of_class = [j for label, j in pairs if label == i]
        assert counts[i].tolist() == [of_class.count(j) for j in range(7)]
        if of_class:
            expected = 100 * of_class.count(i) / len(of_class)
            assert predictions.class_accuracy[i] == pytest.approx(expected)
    assert math.isnan(predictions.class_accuracy[6])
    assert predictions.present.tolist() == [0, 1, 2, 3, 4, 5]


def test_most_confused_pairs_and_their_examples(predictions):
    errors = [pair for pair in pairs_of(predictions) if pair[0] != pair[1]]
    frequencies = sorted((errors.count(pair) for pair in set(errors)), reverse=True)
    found = predictions.most_confused(5)
    assert [n for _, _, n in found] == frequencies[:5]
    assert all(errors.count((i, j)) == n for i, j, n in found)
    i, j, n = found[0]
    of_pair = [k for k, pair in enumerate(pairs_of(predictions)) if pair == (i, j)]
    expected = sorted(of_pair, key=lambda k: -predictions.confidence[k])[:4]
    assert predictions.examples(i, j, 4).tolist() == expected
    assert len(predictions.examples(i, j, 999)) == n
    perfect = Predictions(np.arange(7), np.arange(7), np.ones(7), NAMES)
    assert perfect.most_confused(3) == [] and perfect.confused_block(3) == []


def test_the_confused_block_holds_the_worst_pair_and_has_its_size(predictions):
    i, j, _ = predictions.most_confused(1)[0]
    for size in (2, 4):
        block = predictions.confused_block(size)
        assert {i, j} <= set(block) and len(block) == size and block == sorted(block)


def test_predictions_are_those_of_single_images(sample_root):
    model = make_network(4).eval()
    found = analysis.ValidationImages(sample_root, 0).predict(model, "net")
    dataset = MiniPlacesLoader(sample_root, None, 10, "val")
    transform = student_code.get_val_transforms()
    for k in range(0, len(dataset), 7):
        x = transform(load_image(dataset.image_folder / dataset.paths[k]))
        with torch.no_grad():
            p = model(x[None]).softmax(1)[0]
        assert found.labels[k] == dataset.labels[k] and found.predictions[k] == p.argmax()
        assert found.confidence[k] == pytest.approx(p.max().item(), rel=1e-4)
    assert len(found.labels) == len(dataset) and found.names[0] == "beach"


def test_images_that_the_run_left_out_stay_out(our_run, sample_root):
    (run,) = records.read_runs([our_run])
    everything = MiniPlacesLoader(sample_root, None, 10, "val")
    run.config["left_out"] = everything.paths[:3]
    found = analysis.analyse(run, sample_root, 0).predictions
    assert len(found.labels) == len(everything) - 3


def test_data_of_another_number_of_classes_is_an_error(our_run, sample_root, tmp_path):
    (tmp_path / "images").symlink_to(sample_root / "images")
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text((sample_root / f"{split}.txt").read_text())
    first = (sample_root / "train.txt").read_text().split()[0]
    with open(tmp_path / "val.txt", "a") as file:
        file.write(f"{first} 10\n")
    (run,) = records.read_runs([our_run])
    with pytest.raises(UserError, match="has 11 classes and the network of SimpleNet 10"):
        analysis.analyse(run, tmp_path, 0)


def test_flops_by_hand():
    conv = nn.Conv2d(3, 8, 5, stride=2, padding=2)  # 64 x 64 outputs of 8 channels
    assert analysis.count_flops(conv) == 2 * 64 * 64 * 8 * (3 * 5 * 5)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 7))
    assert analysis.count_flops(dense) == 2 * 7 * 3 * 128 * 128
    ours = student_code.SimpleNet(student_code.CustomConv2d)
    assert analysis.count_flops(ours) == analysis.count_flops(student_code.SimpleNet())
