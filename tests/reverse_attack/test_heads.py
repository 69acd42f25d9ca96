"""Heads on disk."""

from __future__ import annotations

import torch
from reverse_toys import CLASSES, run, weights

from deepvision import checkpoint
from reverse_attack import classifier, heads, inference, train
from reverse_attack.data import list_images
from reverse_attack.views import MIN_CROP


def test_a_head_comes_back_as_it_was_trained_with_its_bank(root):
    args = inference.parse(["--weights", str(weights(root))])
    args.device, args.logs = torch.device("cpu"), root / "logs"
    loaded = classifier.from_args(args, CLASSES)
    head, content = heads.from_args(args, loaded), checkpoint.load(weights(root, "ssl"))
    bank = head.contrastive_loss(loaded, 3).bank
    assert torch.equal(bank, content["bank"]) and bank.shape == (64, 64)
    assert head.contrastive_loss(loaded, 3, "batch").bank is None
    assert not any(module.training for module in head.contrastive_loss(loaded, 3).modules())
    for name, value in head.head.state_dict().items():
        assert torch.equal(value, content["state_dict"][name])
    train_set, _ = list_images("cifar10", root, "train").split(0, 64)
    clean = loaded.model.features(train_set.x / 255).mean(0)  # the bank: views of these
    assert torch.corrcoef(torch.stack([clean, bank.mean(0)]))[0, 1] > 0.2


def test_a_reversal_crops_as_its_head_was_trained_unless_min_crop_is_given(root, tmp_path):
    line = f"--task SSL --epochs 1 --n-views 2 --preset paper --weights {weights(root)}"
    assert run(root, train, line, logs=tmp_path) == 0
    (path,) = tmp_path.glob("cifar10_ssl_*/models/*")
    head = torch.load(path, weights_only=True)
    assert (head["min_crop"], head["n_views"]) == (0.08, 2)
    args = inference.parse(["--weights", str(weights(root)), "--head", str(path)])
    args.device, args.logs = torch.device("cpu"), tmp_path
    loaded = classifier.from_args(args, CLASSES)
    trained = heads.from_args(args, loaded)
    assert trained.contrastive_loss(loaded, 2).min_crop == 0.08
    assert trained.contrastive_loss(loaded, 2, min_crop=0.5).on_views(3).min_crop == 0.5
    del trained.ckpt["min_crop"]  # as in older files
    assert trained.contrastive_loss(loaded, 2).min_crop == MIN_CROP
