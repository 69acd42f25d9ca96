"""-e --views: each view and the mean of all against images transformed one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from custom_dataloader import MiniPlacesLoader
from deepvision.evaluation import views
from deepvision.runtime.device import DeviceContext
from student_code import SimpleViT, get_val_transforms
from utils import UserError

CPU = DeviceContext(torch.device("cpu"))


@pytest.fixture
def val_set(sample_root) -> MiniPlacesLoader:
    return MiniPlacesLoader(sample_root, None, 10, "val", get_val_transforms())


def network() -> nn.Module:
    """Any size; not symmetric, so that mirror images matter."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 9, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 10)).eval()


@torch.no_grad()
def by_hand(net: nn.Module, val_set: MiniPlacesLoader, transforms) -> torch.Tensor:
    x = torch.stack([transforms(val_set.read(i)) for i in range(len(val_set))])
    return net(x) + net(x.flip(3))


def test_every_view_and_their_mean_are_those_of_single_images(val_set):
    net, labels = network(), torch.tensor(val_set.labels)
    given = dict(views.evaluate_views(net, val_set, CPU, workers=0))
    logits = {views.COURSE: by_hand(net, val_set, val_set.transforms)}
    for size in views.SIZES:
        transforms = views.whole_image(size)
        assert transforms(val_set.read(0)).shape == (3, size, size)
        logits[f"whole image at {size}"] = by_hand(net, val_set, transforms)
    logits["mean of all 5"] = torch.stack(list(logits.values())).mean(0)
    assert list(given) == list(logits)
    for name, expected in logits.items():
        hits = (expected.argmax(1) == labels).float().mean().item()
        assert given[name].acc1 == pytest.approx(100 * hits)
    assert len({metrics.acc1 for metrics in given.values()}) > 1


def test_a_network_of_one_size_is_one_line(val_set):
    net = SimpleViT(num_classes=10, embed_dim=8, depth=1, num_heads=1, window_block_indexes=())
    with pytest.raises(UserError, match="no images of 144 pixels .*144x144.*leave --views out"):
        next(views.evaluate_views(net, val_set, CPU, workers=0))
