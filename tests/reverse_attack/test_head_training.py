"""Training of the head: the frozen classifier, the batches of views."""

from __future__ import annotations

import torch
from reverse_toys import assert_unchanged, images, make_loss, snapshot

from reverse_attack import head_training
from reverse_attack.data import Images


def test_head_training_leaves_the_classifier_and_its_buffers_as_they_were():
    loss = make_loss()
    model = loss.classifier
    before = snapshot(model)
    train = Images((255 * images(24)).byte(), torch.zeros(24), ["only"])
    for cached in (None, head_training.view_features(model, train, 3, 0)):
        features = head_training.ViewFeatures(model, train, 2, cached)
        (head, first), *_, (head, last) = head_training.fit(
            features, "Cosine", 15, 12, 1e-2, "Adam", 0
        )
        assert last < first
    assert_unchanged(before, snapshot(model))
    assert not any(isinstance(p.grad, torch.Tensor) for p in model.parameters())


def test_the_batch_of_features_holds_views_of_the_right_images():
    train = Images(torch.zeros(10, 3, 8, 8).byte(), torch.zeros(10), ["only"])
    cached = (10 * torch.arange(10)[:, None] + torch.arange(3)).unsqueeze(2).float()
    features = head_training.ViewFeatures(None, train, 2, cached)
    batches = list(features(4, torch.Generator().manual_seed(0)))
    assert [len(b) for b in batches] == [4, 4]
    image, view = torch.cat(batches)[..., 0] // 10, torch.cat(batches)[..., 0] % 10
    assert (image[:, 0] == image[:, 1]).all() and (view[:, 0] != view[:, 1]).all()
    assert len(image[:, 0].unique()) == 8
    (small,) = features(64, torch.Generator())  # fewer images than the batch
    assert len(small) == 10
