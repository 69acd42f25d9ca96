"""The residual networks: names, sizes, and a block by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from reverse_attack import resnets
from reverse_attack.classifier import Classifier

WRN_28_10 = 36_479_194  # parameters; table 4 of the paper rounds to 36.5 M


def public_names(depth: int) -> set[str]:
    """The public robust checkpoint's names, written down group by group."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{k}" for k in norm}
    for group, block in itertools.product((1, 2, 3), range((depth - 4) // 6)):
        prefix = f"block{group}.layer.{block}"
        names |= {f"{prefix}.bn{i}.{k}" for i in (1, 2) for k in norm}
        names |= {f"{prefix}.conv{i}.weight" for i in (1, 2)}
        names |= {f"{prefix}.convShortcut.weight"} if block == 0 else set()
    return names


def test_the_wide_resnet_has_the_public_names_and_size():
    with torch.device("meta"):
        net = resnets.build("wrn-28-10", 10)
    assert set(net.state_dict()) == public_names(28)
    assert sum(p.numel() for p in net.parameters()) == WRN_28_10
    assert net.block3.layer[0].convShortcut.weight.shape == (640, 320, 1, 1)


def test_the_named_networks_have_their_features_and_sizes():
    sizes = {"narrow": (64, 0.175e6), "preact18": (512, 11.17e6), "wrn-34-10": (640, 46.16e6)}
    for arch, (features, parameters) in sizes.items():
        with torch.device("meta"):
            net = resnets.build(arch, 10)
            model = Classifier(net)
        assert model.last.in_features == features
        assert sum(p.numel() for p in net.parameters()) == pytest.approx(parameters, rel=0.005)
    for bad in ("wrn-29-10", "wrn-28-0", "resnet", "wrn-4-1"):
        with pytest.raises(ValueError, match="wrn-"):
            resnets.build(bad, 10)


def test_a_block_is_pre_activation_with_its_shortcut_after_the_first_norm():
    torch.manual_seed(0)
    block = resnets.PreActBlock(3, 5, 2).eval()
    x = torch.randn(2, 3, 8, 8)
    h = F.relu(block.bn1(x))
    inner = block.conv2(F.relu(block.bn2(block.conv1(h))))
    torch.testing.assert_close(block(x), inner + F.conv2d(h, block.convShortcut.weight, stride=2))
