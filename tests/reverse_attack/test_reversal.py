"""The reversal: its ball, its seeds, what it may not change."""

from __future__ import annotations

import pytest
import torch
from reverse_toys import assert_unchanged, images, make_loss, snapshot

from deepvision.attacks import lp_norm
from reverse_attack.reversal import BUDGETS, REVERSAL_FACTOR, Reversal, add_noise

BUDGET = {norm: REVERSAL_FACTOR * epsilon for norm, epsilon in BUDGETS.items()}


@pytest.mark.parametrize("norm", BUDGETS)
def test_the_reversal_stays_in_its_ball_within_valid_pixels(norm):
    x = images()
    reversed_ = Reversal(make_loss(), norm, steps=10)(x, seed=0)
    assert reversed_.min() >= 0 and reversed_.max() <= 1
    unit = 255 if norm == "linf" else 1
    lengths = lp_norm(reversed_ - x, norm) * unit
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


def test_noise_has_the_radius_of_the_reversal():
    x = images(3)
    for norm, radius in BUDGET.items():
        moved = add_noise(x, norm, radius, seed=0)
        assert moved.min() >= 0 and moved.max() <= 1
        lengths = lp_norm(moved - x, norm) * (255 if norm == "linf" else 1)
        assert 0.4 * radius < lengths.min() and lengths.max() <= radius * (1 + 1e-4)
        assert torch.equal(moved, add_noise(x, norm, radius, seed=0))


@pytest.mark.parametrize("norm", BUDGETS)
def test_a_random_start_is_drawn_within_the_ball_and_follows_the_seed(norm):
    x, loss = images(), make_loss()
    reversal = Reversal(loss, norm, step_size=0.0, steps=1, random_start=True)  # the start alone
    moved = reversal(x, seed=1)
    lengths = lp_norm(moved - x, norm) * (255 if norm == "linf" else 1)
    assert 0.4 * BUDGET[norm] < lengths.min() and lengths.max() <= BUDGET[norm] * (1 + 1e-4)
    assert torch.equal(moved, reversal(x, seed=1)) and not torch.equal(moved, reversal(x, seed=2))
