"""The reversal: its ball, its seeds, what it may not know and must not change."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

from deepvision.attacks.norms import size
from deepvision.attacks.pgd import margin
from reverse_attack import head_training, resnets
from reverse_attack.adaptive import DefenceAware
from reverse_attack.classifier import Classifier
from reverse_attack.contrastive import ContrastiveLoss, Head
from reverse_attack.data import Images
from reverse_attack.inference import measure
from reverse_attack.protocol import PROTOCOLS, Evaluation
from reverse_attack.reversal import BUDGETS, REVERSAL_FACTOR, Reversal, noise

BUDGET = {norm: REVERSAL_FACTOR * epsilon for norm, epsilon in BUDGETS.items()}


def make_loss(n_views: int = 2, bank: bool = True, seed: int = 0) -> ContrastiveLoss:
    torch.manual_seed(seed)
    model = Classifier(resnets.build("wrn-10-1", 5)).eval()
    features = torch.rand(12, 64) if bank else None
    return ContrastiveLoss(model, Head(64), n_views=n_views, bank=features).eval()


def images(n: int = 4) -> torch.Tensor:
    """Pixels in [0, 1], black and white ones among them."""
    x = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    return (1.4 * x - 0.2).clamp(0, 1)


def snapshot(*modules: torch.nn.Module) -> list:
    state = [v.clone() for m in modules for v in (*m.parameters(), *m.buffers())]
    modes = [m.training for module in modules for m in module.modules()]
    wanted = [(p.requires_grad, p.grad) for module in modules for p in module.parameters()]
    return [state, modes, wanted]


def assert_unchanged(before: list, after: list) -> None:
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]


@pytest.mark.parametrize("norm", BUDGETS)
def test_the_reversal_stays_in_its_ball_within_valid_pixels(norm):
    x = images()
    reversed_ = Reversal(make_loss(), norm, steps=10)(x, seed=0)
    assert reversed_.min() >= 0 and reversed_.max() <= 1
    unit = 255 if norm == "linf" else 1
    lengths = size(reversed_ - x, norm) * unit
    assert lengths.max() <= BUDGET[norm] * (1 + 1e-4)
    assert lengths.min() >= 0.3 * BUDGET[norm]


@pytest.mark.parametrize("norm", BUDGETS)
@pytest.mark.parametrize("nothing", [{"steps": 0}, {"epsilon": 0.0}])
def test_no_steps_or_no_radius_leave_every_bit(norm, nothing):
    x = images()
    assert torch.equal(Reversal(make_loss(), norm, **{"steps": 3, **nothing})(x, 0), x)


def test_the_first_step_descends_the_loss_of_the_views_it_saw():
    loss, x = make_loss(), images()
    moved = Reversal(loss, epsilon=0.1, step_size=0.1, steps=1)(x, seed=3)
    loss.generator.manual_seed(3)
    before = loss(x)
    loss.generator.manual_seed(3)
    assert (loss(moved) < before).all()


def test_many_steps_lower_the_loss_of_views_that_were_not_seen():
    loss, x = make_loss(n_views=4), images()
    moved = Reversal(loss, epsilon=32.0, steps=20)(x, seed=3)

    def on_fresh_views(x):
        loss.generator.manual_seed(10**6)
        with torch.no_grad():
            return torch.stack([loss(x) for _ in range(20)]).mean(0)

    assert (on_fresh_views(moved) < on_fresh_views(x)).all()


def test_same_seed_same_pixels_whatever_the_global_generator():
    loss, x = make_loss(), images()
    reversal = Reversal(loss, steps=3)
    torch.manual_seed(1)
    first = reversal(x, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, reversal(x, seed=5))
    assert not torch.equal(first, reversal(x, seed=6))


def test_with_the_bank_an_images_answer_does_not_depend_on_its_neighbours():
    x = images()
    other = torch.cat([x[:1], x.flip(0)[:3]])
    for bank, alone in ((True, True), (False, False)):
        reversal = Reversal(make_loss(bank=bank), steps=3)
        a, b = reversal(x, 0)[0], reversal(other, 0)[0]
        assert torch.allclose(a, b, atol=1e-6) == alone
    assert Reversal(make_loss(), steps=2)(x[:1], 0).shape == x[:1].shape


def test_labels_reach_no_reversed_pixel():
    assert set(inspect.signature(Reversal.__call__).parameters) == {"self", "x", "seed"}
    loss, x = make_loss(), images(6)
    y, seen = torch.tensor([0, 1, 2, 3, 4, 0]), []

    class Args:
        norm, task, batchsize, seed = "l_inf", "SSL", 3, 0

    def repair(pixels, seed):
        seen.append(Reversal(loss, steps=2)(pixels, seed))
        return seen[-1]

    for labels in (y, y.flip(0)):
        measure(loss.classifier, x, labels, repair, Args, torch.device("cpu"))
    assert torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:]))


def test_reversal_and_attacks_leave_both_networks_as_they_were():
    loss, x = make_loss(), images()
    loss.classifier.net.train()
    loss.classifier.net.block1.eval()
    before = snapshot(loss)
    Reversal(loss, steps=2)(x, 0)
    assert_unchanged(before, snapshot(loss))


def test_a_loss_in_training_mode_leaves_the_classifiers_mode_alone():
    loss = make_loss().train()
    loss.classifier.eval()
    before = snapshot(loss.classifier)
    Reversal(loss.on_views(2), steps=1)(images(), seed=0)
    assert_unchanged(before, snapshot(loss.classifier))


def test_head_training_leaves_the_classifier_and_its_buffers_as_they_were():
    loss = make_loss()
    model, device = loss.classifier, torch.device("cpu")
    before = snapshot(model)
    train = Images((255 * images(24)).byte(), torch.zeros(24), ["only"])
    for cached in (None, head_training.features_of_views(model, train, 3, 0, device)):
        features = head_training.ViewFeatures(model, train, 2, device, cached)
        (head, first), *_, (head, last) = head_training.fit(
            features, "Cosine", 15, 12, 1e-2, "Adam", 0
        )
        assert last < first
    assert_unchanged(before, snapshot(model))
    assert not any(isinstance(p.grad, torch.Tensor) for p in model.parameters())


def test_the_batch_of_features_holds_views_of_the_right_images():
    train = Images(torch.zeros(10, 3, 8, 8).byte(), torch.zeros(10), ["only"])
    cached = (10 * torch.arange(10)[:, None] + torch.arange(3)).unsqueeze(2).float()
    features = head_training.ViewFeatures(None, train, 2, torch.device("cpu"), cached)
    batches = list(features(4, torch.Generator().manual_seed(0)))
    assert [len(b) for b in batches] == [4, 4]
    image, view = torch.cat(batches)[..., 0] // 10, torch.cat(batches)[..., 0] % 10
    assert (image[:, 0] == image[:, 1]).all() and (view[:, 0] != view[:, 1]).all()
    assert len(image[:, 0].unique()) == 8
    (small,) = features(64, torch.Generator())  # fewer images than the batch
    assert len(small) == 10


def test_noise_has_the_radius_of_the_reversal():
    x = images(3)
    for norm, radius in BUDGET.items():
        moved = noise(x, norm, radius, seed=0)
        assert moved.min() >= 0 and moved.max() <= 1
        lengths = size(moved - x, norm) * (255 if norm == "linf" else 1)
        assert 0.4 * radius < lengths.min() and lengths.max() <= radius * (1 + 1e-4)
        assert torch.equal(moved, noise(x, norm, radius, seed=0))


def test_the_defence_aware_loss_asks_for_agreement_too():
    loss, x, y = make_loss(), images(), torch.tensor([0, 1, 2, 3])
    aware = DefenceAware(loss.classifier, loss, margin, 10.0, seed=0)
    joint = aware.joint_loss(aware(x), y, None)
    aware = DefenceAware(loss.classifier, loss, margin, 10.0, seed=0)  # the same views again
    torch.testing.assert_close(joint, margin(loss.classifier(x), y, None) - 10 * loss(x))


def test_the_same_answers_are_compared_in_every_cell():
    """Judging twice gives the same answers; an image right in no cell counts as wrong."""
    loss, x = make_loss(), images()
    sizes = dataclasses.replace(PROTOCOLS["quick"], n=4, n_adaptive=2, short=(2, 2))
    y = loss.classifier(x).argmax(1)
    evaluation = Evaluation(loss.classifier, loss, loss, x, y, sizes, 8.0, 2, seed=0)
    reversal = evaluation.reversal(sizes.short)
    assert reversal.radius == 16.0 and reversal.loss.n_views == 2
    made = x, None
    first, second = evaluation.judge(made, reversal), evaluation.judge(made, reversal)
    assert torch.equal(first.defended, second.defended) and first.static.all()
    with torch.no_grad():
        expected = [reversal(x[i : i + 2], i) for i in (0, 2)]
        answers = torch.cat([loss.classifier(v).argmax(1) for v in expected])
    assert torch.equal(first.defended, answers == y)
