"""The defended classifier and the defence-aware loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from reverse_toys import images, make_loss, random

from deepvision.attacks.losses import margin
from reverse_attack import resnets
from reverse_attack.adaptive import ATTACKER_SEEDS, DefenceAware, Defended
from reverse_attack.classifier import Classifier
from reverse_attack.contrastive import ContrastiveLoss, Head
from reverse_attack.reversal import Reversal


def defended(steps: int = 2, draws: int = 3) -> Defended:
    torch.manual_seed(0)
    model = Classifier(resnets.build("wrn-10-1", 5)).eval()
    bank = random(8, 64, seed=2)
    loss = ContrastiveLoss(model, Head(64), n_views=2, bank=bank).eval()
    return Defended(model, Reversal(loss, epsilon=16.0, steps=steps), draws, seed=0).eval()


def test_bpda_takes_the_classifiers_gradient_at_the_reversed_images_averaged_over_draws():
    net, x, y = defended(), random(2, 3, 16, 16), torch.tensor([1, 4])
    seed = ATTACKER_SEEDS
    x = x.requires_grad_(True)
    loss = F.nll_loss(net(x), y, reduction="sum")
    (g,) = torch.autograd.grad(loss, x)

    moved = [net.reversal(x.detach(), seed + k).requires_grad_(True) for k in range(3)]
    assert (moved[0] - moved[1]).abs().max() > 1e-3  # each draw has other views
    p = torch.stack([net.classifier(m).softmax(1) for m in moved]).mean(0)
    expected = -p.gather(1, y[:, None]).log().sum()
    torch.testing.assert_close(loss, expected)
    at_each = torch.autograd.grad(expected, moved)
    torch.testing.assert_close(g, sum(at_each), atol=1e-6, rtol=1e-4)


def test_without_steps_the_defended_classifier_is_the_classifier():
    net, x = defended(steps=0, draws=2), random(2, 3, 16, 16)
    torch.testing.assert_close(net(x), net.classifier(x).log_softmax(1))


def test_the_defence_aware_loss_asks_for_agreement_too():
    loss, x, y = make_loss(), images(), torch.tensor([0, 1, 2, 3])
    aware = DefenceAware(loss.classifier, loss, margin, 10.0, seed=0)
    joint = aware.joint_loss(aware(x), y, None)
    aware = DefenceAware(loss.classifier, loss, margin, 10.0, seed=0)  # the same views again
    torch.testing.assert_close(joint, margin(loss.classifier(x), y, None) - 10 * loss(x))


def test_with_a_fixed_seed_every_call_uses_the_views_of_that_seed():
    net, x = defended(), random(2, 3, 16, 16)
    fixed = Defended(net.classifier, net.reversal, fixed_seed=7).eval()
    expected = net.classifier(net.reversal(x, 7)).log_softmax(1)
    for _ in range(2):
        torch.testing.assert_close(fixed(x), expected)
    assert not torch.allclose(net(x), net(x))
