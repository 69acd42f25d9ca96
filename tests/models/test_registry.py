"""The registry: networks recognised by their weights, loaded from checkpoints, or refused."""

import pytest
import torch
from torch import nn

from deepvision.models import registry
from deepvision.models.scene_net import SHAPES
from utils import UserError

KINDS = ("torch_conv", "vit", "resnet18", "scene_net")


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_recognised_by_its_weights(kind):
    weights = registry.create_model(kind, 7).state_dict()
    assert registry.infer_arch(weights, 7) == kind
    model, found = registry.load_network({"state_dict": weights}, "file")
    assert found == kind
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["scene_net", None])
def test_a_file_builds_the_shape_that_it_records(kind):
    shape = SHAPES["cpu"]
    weights = registry.create_model("scene_net", 7, shape=shape).state_dict()
    ckpt = {"state_dict": weights, "kind": kind, "shape": shape.save()}
    model, found = registry.load_network(ckpt, "file")
    assert found == "scene_net" and model.shape == shape
    with pytest.raises(UserError, match="SceneNet for 7 classes and the data folder has 9"):
        registry.load_network(ckpt, "file", num_classes=9)
    with pytest.raises(UserError, match="the checkpoint's shape is invalid"):
        registry.load_network(ckpt | {"shape": {"widths": [10**9]}}, "file")


def test_the_kind_of_the_file_tells_networks_with_equal_weights_apart():
    weights = registry.create_model("custom_conv", 7).state_dict()
    ckpt = {"state_dict": weights, "kind": "custom_conv"}
    assert registry.load_network(ckpt, "file")[1] == "custom_conv"
    assert registry.load_network(ckpt, "file", kind="torch_conv")[1] == "torch_conv"


@pytest.mark.parametrize("kind", [5, "CNN", None, ["vit"]])
def test_an_unknown_kind_in_the_file_is_ignored(kind):
    weights = registry.create_model("torch_conv", 7).state_dict()
    assert registry.load_network({"state_dict": weights, "kind": kind}, "file")[1] == "torch_conv"


def test_weights_of_another_network_are_refused_by_name():
    stranger = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 7)).state_dict()
    with pytest.raises(UserError, match="file holds a network that .*student_code.py"):
        registry.load_network({"state_dict": stranger}, "file")
    vit = registry.create_model("vit", 7).state_dict()
    with pytest.raises(UserError, match="holds SimpleViT, not SceneNet: leave"):
        registry.load_network({"state_dict": vit}, "file", kind="scene_net")
    with pytest.raises(UserError, match="holds SimpleViT for 7 classes and the data folder has 9"):
        registry.load_network({"state_dict": vit}, "file", num_classes=9)
    with pytest.raises(UserError, match="no linear layer"):
        registry.load_network({"state_dict": nn.Conv2d(3, 4, 3).state_dict()}, "file")


def test_every_kind_has_a_name():
    assert registry.NETWORK_NAMES.keys() == registry.MODEL_REGISTRY.keys()


def test_half_precision_weights_load_as_float32():
    weights = registry.create_model("torch_conv", 7).half().state_dict()
    model, _ = registry.load_network({"state_dict": weights}, "file")
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_resnet18_without_a_network_is_one_line(tmp_path, monkeypatch, capfd):
    pytest.importorskip("torchvision")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # refuses connections
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="no ImageNet weights for ResNet-18 .* and put it at"):
        registry.create_model("resnet18", 10, pretrained=True)
    assert capfd.readouterr() == ("", "")
