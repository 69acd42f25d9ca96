"""Classifiers: features, and checkpoints of every origin."""

from __future__ import annotations

import pytest
import torch
from reverse_toys import EPSILONS, random, refused, run, set_of, weights

from deepvision import checkpoint
from deepvision.models import registry
from reverse_attack import attack, classifier, inference, resnets, reversal, train
from reverse_attack.classifier import Classifier


def test_features_are_what_the_last_layer_sees_whatever_the_mean_and_precision():
    torch.manual_seed(0)
    net = resnets.build("wrn-10-1", 7).eval()
    model, x = Classifier(net, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).eval(), random(3, 3, 16, 16)
    features, logits = model.features_and_logits(x)
    torch.testing.assert_close(net.fc(features), logits)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    torch.testing.assert_close(net((x - mean) / std), logits)
    low = Classifier(net, bf16=True).eval()(x)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, Classifier(net).eval()(x), atol=0.1, rtol=0.1)


def test_main_pys_classifiers_can_be_attacked_and_reversed(sample_root, tmp_path):
    logs = tmp_path / "logs"
    net = registry.create_model("torch_conv", 10)
    content = {"kind": "torch_conv", "epoch": 1, "state_dict": net.state_dict()}
    checkpoint.save(path := tmp_path / "scene.pth.tar", content)
    common = ["--dataset", "miniplaces", "--data-root", str(sample_root), "--weights", str(path)]
    common += ["--limit", "6"]
    out = ["--savepath", str(tmp_path)]
    assert attack.main(["--norm", "l_2", "--attack-iters", "1", *common, *out], logs) == 0
    meta = set_of(tmp_path, "l_2", 1)[1]
    assert meta["largest_norm"] == pytest.approx(0.5, rel=1e-3) and meta["images"] == 6
    head = ["--task", "SSL", "--n-views", "2", *common]
    assert train.main(["--epochs", "1", *head], logs) == 0
    assert inference.main(["--attack-iter", "1", *head], logs) == 0


def test_the_public_checkpoints_prefix_and_unused_block_are_ignored(tmp_path):
    torch.manual_seed(1)
    net = resnets.build("wrn-10-2", 10)
    state = {f"module.{k}": v for k, v in net.state_dict().items()}
    state |= {f"module.sub_block1.{k}": v for k, v in net.block1.state_dict().items()}
    torch.save({"state_dict": state, "num_epochs": 3}, path := tmp_path / "public.pt.ckpt")
    model = classifier.load(path, "wrn-10-2", 10).model
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), net.eval()(x))
    assert {k.replace("_", ""): v for k, v in EPSILONS.items()} == reversal.BUDGETS


def test_missing_or_foreign_files_are_one_line(root, tmp_path, capsys):
    missing = f"--weights {tmp_path / 'no.pth.tar'}"
    assert "no checkpoint" in refused(capsys, run(root, attack, missing))
    foreign = f"--arch wrn-10-1 --weights {weights(root)}"
    assert "does not fit" in refused(capsys, run(root, inference, foreign))
    head = f"--task SSL --head {weights(root)}"
    assert "belongs to another" in refused(capsys, run(root, inference, head))
    assert "attack.py --norm l_1 --attack-iters 7" in refused(
        capsys, run(root, inference, "--norm l_1 --iter 7")
    )
    assert "train one with" in refused(capsys, run(root, attack, "--arch preact18"))
    assert "no CIFAR-10" in refused(capsys, run(tmp_path, train, "--task Clean"))
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert "try --download" in refused(capsys, run(tmp_path, attack, ""))
    line = "--dataset miniplaces"
    assert "there is no folder" in refused(capsys, run(tmp_path, attack, line))
    assert "--device" in refused(capsys, run(root, attack, "--device tpu"))
