"""Part IV's networks, views, contrastive loss and counts, each against another way to have it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from reverse_attack import resnets, verdict
from reverse_attack.adaptive import Defended
from reverse_attack.classifier import Classifier
from reverse_attack.contrastive import TEMPERATURE, ContrastiveLoss, Head, chance, info_nce
from reverse_attack.intervals import Paired, mcnemar
from reverse_attack.protocol import Cost, Result
from reverse_attack.reversal import Reversal
from reverse_attack.views import crop, hue_rotation, recolour, views

WRN_28_10 = 36_479_194  # parameters, as the paper's table 4 rounds: 36.5 M


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


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


def test_features_are_what_the_last_layer_sees_whatever_the_mean_and_precision():
    torch.manual_seed(0)
    net = resnets.build("wrn-10-1", 7).eval()
    model, x = Classifier(net, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).eval(), random(3, 3, 16, 16)
    features, logits = model.both(x)
    torch.testing.assert_close(net.fc(features), logits)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    torch.testing.assert_close(net((x - mean) / std), logits)
    low = Classifier(net, bf16=True).eval()(x)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, Classifier(net).eval()(x), atol=0.1, rtol=0.1)


# ---------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------


def test_every_view_is_drawn_by_itself_and_follows_the_seed():
    x = random(1, 3, 16, 16).expand(3, -1, -1, -1)
    seen = views(x, 4, torch.Generator().manual_seed(5))
    assert seen.shape == (3, 4, 3, 16, 16)
    assert seen.min() >= 0 and seen.max() <= 1
    flat = seen.flatten(0, 1)
    for a, b in itertools.combinations(flat, 2):
        assert (a - b).abs().max() > 0.01
    assert torch.equal(seen, views(x, 4, torch.Generator().manual_seed(5)))


def test_views_are_differentiable():
    x = (0.3 + 0.4 * random(2, 3, 8, 8)).double().requires_grad_(True)

    def mean_of_views(x):
        return views(x, 2, torch.Generator().manual_seed(1)).square().mean((2, 3, 4))

    assert torch.autograd.gradcheck(mean_of_views, x, eps=1e-6, atol=1e-5, nondet_tol=1e-9)


def test_crops_are_straight_windows_of_every_size_half_of_them_mirrored():
    ramp = (torch.arange(32) + 0.5) / 32
    across, down = ramp.expand(32, 32), ramp[:, None].expand(32, 32)
    x = torch.stack([across, down, torch.zeros(32, 32)]).expand(500, -1, -1, -1)
    seen = crop(x, torch.Generator().manual_seed(0))
    slope_x = seen[:, 0, :, 8:24].diff(dim=2).mean((1, 2)) * 32  # width of the window, signed
    slope_y = seen[:, 1, 8:24].diff(dim=1).mean((1, 2)) * 32
    assert seen[:, 0].diff(dim=1).abs().max() < 1e-5  # rows stay rows
    area = slope_x.abs() * slope_y
    assert 0.19 < area.min() < 0.25 and 0.85 < area.max() <= 1.01
    assert (slope_y > 0).all()
    assert 0.4 < (slope_x < 0).float().mean() < 0.6


def test_colours_are_those_of_torchvisions_operations_in_order():
    functional = pytest.importorskip("torchvision.transforms.functional", reason="optional here")
    x = 0.4 + 0.1 * random(1, 3, 6, 6)
    for seed in range(30):
        seen = recolour(x, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        jittered = torch.rand(1, generator=generator) < 0.8
        b, c, s = (0.2 + 1.6 * torch.rand(1, generator=generator) for _ in range(3))
        turn = -0.2 + 0.4 * torch.rand(1, generator=generator)
        grey = torch.rand(1, generator=generator) < 0.2
        if grey or not jittered:  # torchvision's hue goes by HSV, ours by YIQ: without hue
            expected = x
            if jittered:
                luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
                mean = (b * x * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
                expected = c * b * x + (1 - c) * mean
            if grey:
                expected = functional.rgb_to_grayscale(expected, 3)
            torch.testing.assert_close(seen, expected, atol=2e-4, rtol=2e-3)
        else:
            matrix = hue_rotation(turn)[0]
            rotated = torch.einsum("ij,njhw->nihw", torch.linalg.inv(matrix), seen)
            mean = (functional.rgb_to_grayscale(b * x)).mean()
            expected = x * b * c + (1 - c) * mean
            grey_of = functional.rgb_to_grayscale(expected, 3)
            torch.testing.assert_close(
                rotated, s * expected + (1 - s) * grey_of, atol=2e-3, rtol=2e-3
            )


def test_a_turn_of_the_hue_keeps_grey_and_comes_round():
    for turn in (0.0, 1.0):
        torch.testing.assert_close(
            hue_rotation(torch.tensor([turn]))[0], torch.eye(3), atol=1e-5, rtol=0
        )
    third = hue_rotation(torch.tensor([1 / 3]))[0]
    torch.testing.assert_close(third @ torch.ones(3), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(third @ third @ third, torch.eye(3), atol=1e-4, rtol=0)
    assert (third - torch.eye(3)).abs().max() > 0.5


# ---------------------------------------------------------------------------------------------
# InfoNCE
# ---------------------------------------------------------------------------------------------


def double_loop(z, similarity, bank=None):
    """The definition, image by image and view by view."""

    def s(a, b):
        dot = sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True))
        if similarity == "Cosine":
            dot /= math.sqrt(sum(p * p for p in a.tolist()) * sum(q * q for q in b.tolist()))
        return dot / TEMPERATURE

    N, V, _ = z.shape
    losses = []
    for n in range(N):
        total = 0.0
        for v in range(V):
            own = [(n, w) for w in range(V) if w != v]
            if bank is None:
                others = [(m, w) for m in range(N) for w in range(V) if m != n]
                candidates = [z[i] for i in own + others]
            else:
                candidates = [z[i] for i in own] + list(bank)
            scores = sum(math.exp(s(z[n, v], c)) for c in candidates)
            for w in own:
                total -= math.log(math.exp(s(z[n, v], z[w])) / scores) / len(own)
        losses.append(total / V)
    return torch.tensor(losses, dtype=z.dtype)


@pytest.mark.parametrize("similarity", ["Cosine", "Dot"])
@pytest.mark.parametrize("n_views", [2, 3, 4])
def test_info_nce_is_the_double_loop(n_views, similarity):
    generator = torch.Generator().manual_seed(n_views)
    z = torch.randn(4, n_views, 5, generator=generator, dtype=torch.float64)
    bank = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(info_nce(z, similarity), double_loop(z, similarity))
    torch.testing.assert_close(info_nce(z, similarity, bank), double_loop(z, similarity, bank))


def test_embeddings_that_tell_nothing_are_at_chance():
    same = torch.ones(6, 4, 3)
    torch.testing.assert_close(info_nce(same).mean().item(), chance(6 * 4 - 1))
    torch.testing.assert_close(info_nce(same, bank=torch.ones(9, 3)).mean().item(), chance(3 + 9))


# ---------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------


def test_mcnemar_counts_coin_tosses():
    for fixed, broken in itertools.product(range(6), repeat=2):
        n, gap = fixed + broken, abs(fixed - broken)
        tosses = itertools.product((0, 1), repeat=n)
        as_uneven = sum(abs(2 * sum(toss) - n) >= gap for toss in tosses) / 2**n
        assert mcnemar(fixed, broken) == pytest.approx(as_uneven)


def test_pairs_count_both_ways():
    before = torch.tensor([True, True, False, False, True])
    after = torch.tensor([True, False, True, True, True])
    paired = Paired.of(before, after)
    assert (paired.fixed, paired.broken, paired.gain) == (2, 1, pytest.approx(20.0))


# ---------------------------------------------------------------------------------------------
# Adaptive attacks
# ---------------------------------------------------------------------------------------------


def defended(steps: int = 2, draws: int = 3) -> Defended:
    torch.manual_seed(0)
    model = Classifier(resnets.build("wrn-10-1", 5)).eval()
    bank = random(8, 64, seed=2)
    loss = ContrastiveLoss(model, Head(64), n_views=2, bank=bank).eval()
    return Defended(model, Reversal(loss, epsilon=16.0, steps=steps), draws, seed=0).eval()


def test_bpda_takes_the_classifiers_gradient_at_the_reversed_images_averaged_over_draws():
    net, x, y = defended(), random(2, 3, 16, 16), torch.tensor([1, 4])
    seed = net.next_seed
    x = x.requires_grad_(True)
    loss = F.nll_loss(net(x), y, reduction="sum")
    (g,) = torch.autograd.grad(loss, x)

    moved = [net.reversal(x.detach(), seed + k).requires_grad_(True) for k in range(3)]
    assert (moved[0] - moved[1]).abs().max() > 1e-3  # each draw has views of its own
    p = torch.stack([net.classifier(m).softmax(1) for m in moved]).mean(0)
    expected = -p.gather(1, y[:, None]).log().sum()
    torch.testing.assert_close(loss, expected)
    at_each = torch.autograd.grad(expected, moved)
    torch.testing.assert_close(g, sum(at_each), atol=1e-6, rtol=1e-4)


def test_without_steps_the_defended_classifier_is_the_classifier():
    net, x = defended(steps=0, draws=2), random(2, 3, 16, 16)
    torch.testing.assert_close(net(x), net.classifier(x).log_softmax(1))


# ---------------------------------------------------------------------------------------------
# Verdict
# ---------------------------------------------------------------------------------------------


def result(fixed: int, broken: int) -> Result:
    """40 images, of which the repair changes these."""
    static = torch.arange(40) < 20
    defended = static.clone()
    defended[20 : 20 + fixed], defended[:broken] = True, False
    return Result(static, defended, Cost(2, 0.5), Cost(3, 0.25))


@pytest.mark.parametrize(
    ("fixed", "broken", "words"),
    [(15, 2, "the reversal helps"), (1, 14, "the reversal harms"), (6, 3, "not shown to help")],
)
def test_the_verdict_says_which_way_the_counts_point(fixed, broken, words):
    row = verdict.row_of(result(fixed, broken))
    assert row["gain"] == pytest.approx(100 * (fixed - broken) / 40)
    content = {
        "transfer": {"clean": {"transfer": row}, "PGD": {"transfer": row}},
        "controls": {"untrained head": {"control": row}, "noise": {"control": row}},
        "worst_case": row,
    }
    assert words in verdict.in_words(content)


def test_the_worst_case_needs_every_answer_right():
    table = {"a": {"x": result(10, 0), "y": result(0, 5)}, "b": {"x": result(3, 0)}}
    worst = verdict.worst(table)
    assert (worst.static.sum(), worst.defended.sum()) == (20, 15)
    assert (worst.attack, worst.defence) == (Cost(6, 1.5), Cost(9, 0.75))
