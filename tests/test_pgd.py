"""PGDAttack and vis_grid of student_code.py, against a plain loop, and their side effects."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from student_code import PGDAttack, default_attack, default_visfunction, vis_grid

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(1, 3, 1, 1)


def make_net(classes: int = 5) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(72, classes),
    )


def images(n: int = 6, dtype=torch.float32) -> torch.Tensor:
    """Normalised images, black and white pixels among them."""
    pixels = torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(7))
    return ((1.4 * pixels - 0.2).clamp(0, 1) - MEAN).div(STD).to(dtype)


def attack(**kwargs) -> PGDAttack:
    return PGDAttack(nn.CrossEntropyLoss(), **kwargs)


def plain_loop(net, x, label, sign, steps, step_size, epsilon, repick=False):
    """The assignment's attack, pixel for pixel, with no care for anything but the result."""
    x_adv = x
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_(True)
        logits = net(x_adv)
        label = logits.argmin(1) if repick else label
        F.cross_entropy(logits, label).backward()
        x_adv = x_adv.detach() + sign * step_size * x_adv.grad.sign()
        x_adv = torch.max(torch.min(x_adv, x + epsilon), x - epsilon)
        pixels = (x_adv * STD + MEAN).clamp(0, 1)
        x_adv = (pixels - MEAN) / STD
    return x_adv.detach()


def test_the_default_descends_the_loss_of_the_clean_images_least_likely_label():
    net, x = make_net().double().eval(), images(dtype=torch.float64)
    least = net(x).argmin(1)
    x_adv = default_attack(nn.CrossEntropyLoss()).perturb(net, x)
    expected = plain_loop(net, x, least, -1, 10, 0.01, 0.1)
    torch.testing.assert_close(x_adv, expected, atol=1e-9, rtol=0)
    before, after = (F.cross_entropy(net(v), least, reduction="none") for v in (x, x_adv))
    assert (after < before).all()


def test_the_label_stays_fixed_when_another_becomes_least_likely():
    net, x = make_net().double().eval(), images(dtype=torch.float64)
    kwargs = {"steps": 20, "step_size": 0.1, "epsilon": 1.0}
    x_adv = attack(num_steps=20, step_size=0.1, epsilon=1.0).perturb(net, x)
    least = net(x).argmin(1)
    fixed = plain_loop(net, x, least, -1, **kwargs)
    repicked = plain_loop(net, x, least, -1, **kwargs, repick=True)
    torch.testing.assert_close(x_adv, fixed, atol=1e-9, rtol=0)
    assert not torch.allclose(fixed, repicked, atol=0.1)  # else this test would show nothing
    assert (net(x_adv).argmax(1) == least).float().mean() > (
        (net(repicked).argmax(1) == least).float().mean()
    )


@pytest.mark.parametrize("given", [True, False])
def test_untargeted_ascends_the_loss_of_the_label(given):
    net, x = make_net().double().eval(), images(dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 3, 4, 0]) if given else None
    x_adv = attack(targeted=False).perturb(net, x, label)
    ascended = label if given else net(x).argmax(1)
    expected = plain_loop(net, x, ascended, 1, 10, 0.01, 0.1)
    torch.testing.assert_close(x_adv, expected, atol=1e-9, rtol=0)


def test_a_given_target_is_approached():
    net, x = make_net().double().eval(), images(dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 3, 4, 0])
    expected = plain_loop(net, x, label, -1, 10, 0.01, 0.1)
    torch.testing.assert_close(attack().perturb(net, x, label), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("random_start", [True, False])
def test_ball_and_valid_pixels(targeted, random_start):
    net, x = make_net(), images()
    kwargs = {"targeted": targeted, "random_start": random_start}
    x_adv = attack(num_steps=4, step_size=0.2, epsilon=0.3, **kwargs).perturb(net, x)
    assert (x_adv - x).abs().max().item() == pytest.approx(0.3, abs=1e-5)
    pixels = x_adv * STD + MEAN
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6


def test_a_random_start_is_spread_over_the_ball_and_follows_the_seed():
    net, x = make_net().double(), images(dtype=torch.float64) * 0.3
    starter = attack(num_steps=1, step_size=0.0, epsilon=0.2, random_start=True)
    torch.manual_seed(5)
    first, second = starter.perturb(net, x), starter.perturb(net, x)
    torch.manual_seed(5)
    assert torch.equal(first, starter.perturb(net, x))
    assert not torch.equal(first, second)
    share = ((first - x) / 0.2).flatten().sort().values  # uniform in [-1, 1]
    uniform = torch.linspace(-1, 1, len(share), dtype=torch.float64)
    assert (share - uniform).abs().max() < 0.1


def test_no_step_returns_the_inputs_values_in_another_tensor():
    net, x = make_net(), images()
    for random_start in (False, True):
        x_adv = attack(num_steps=0, random_start=random_start).perturb(net, x)
        assert torch.equal(x_adv, x)
        assert x_adv.data_ptr() != x.data_ptr()


def test_other_means_give_other_pixel_ranges():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x = torch.tensor([[[[0.0, 1.0], [0.5, 0.97]]]])
    grey = attack(step_size=0.1, epsilon=0.2, mean=(0.0,), std=(1.0,))
    x_adv = grey.perturb(net, x)
    assert (x_adv - x).abs().max().item() == pytest.approx(0.2)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    with pytest.raises(ValueError, match="3 channels.*expected"):
        attack().perturb(net, x)


@pytest.mark.parametrize("name", ["num_steps", "step_size", "epsilon"])
def test_negative_budgets_are_refused(name):
    with pytest.raises(ValueError, match="negative"):
        attack(**{name: -1})


def snapshot(net: nn.Module) -> list:
    tensors = [*net.parameters(), *net.buffers()]
    return [
        [module.training for module in net.modules()],
        [p.requires_grad for p in net.parameters()],
        [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in net.parameters()],
        [(t._version, t.clone()) for t in tensors],
    ]


def assert_same(before: list, after: list) -> None:
    assert before[:2] == after[:2]
    for old, new in zip(before[2] + before[3], after[2] + after[3], strict=True):
        assert old[0] == new[0]
        assert (old[1] is None) == (new[1] is None)
        assert old[1] is None or torch.equal(old[1], new[1])


def used_net() -> nn.Module:
    """In training mode but for one layer, one layer frozen, some gradients there, some not."""
    net = make_net().train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[6](torch.randn(2, 72)).sum().backward()
    return net


class Moody(nn.Module):
    """Raises at its n-th call, as a model does that runs out of memory."""

    def __init__(self, net: nn.Module, n: int):
        super().__init__()
        self.net, self.left = net, n

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("out of memory")
        return self.net(x)


@pytest.mark.parametrize("random_start", [True, False])
def test_model_and_input_are_left_as_they_were(random_start):
    net, x = used_net(), images().requires_grad_(True)
    before, values = snapshot(net), x.detach().clone()
    x_adv = attack(random_start=random_start).perturb(net, x)
    assert_same(before, snapshot(net))
    assert torch.equal(x, values)
    assert x.requires_grad and x.grad is None and x._version == 0
    assert not x_adv.requires_grad and x_adv.grad_fn is None


@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_model_that_raises_is_left_as_it_was(call):
    net = Moody(used_net(), call)
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="out of memory"):
        attack().perturb(net, images())
    assert_same(before, snapshot(net))
    assert torch.is_grad_enabled()


def test_the_model_sees_leaves_in_evaluation_mode_with_constant_parameters():
    net, seen = used_net(), []

    def look(module, args):
        seen.append(args[0])
        assert not any(m.training for m in net.modules())
        assert not any(p.requires_grad for p in net.parameters())

    net.register_forward_pre_hook(look)
    attack(num_steps=3).perturb(net, images())
    assert len(seen) == 4  # once for the label, then once a step
    assert all(x.is_leaf for x in seen)  # a graph over steps would have to pass through here


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_works_in_every_gradient_mode(mode):
    net, x, label = make_net(), images(), torch.arange(6) % 5
    expected = attack().perturb(net, x, label)
    with mode():
        inner = images(), torch.arange(6) % 5  # inference tensors in inference mode
        assert torch.equal(attack().perturb(net, *inner), expected)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert torch.equal(attack().perturb(net, *inner), expected)
    assert attack().perturb(net, inner[0]).shape == x.shape


def test_memory_layouts_make_no_difference():
    net, x = make_net(), images(8)
    expected = attack().perturb(net, x)
    wide = torch.stack([x, x], dim=-1)[..., 0]  # strided, not contiguous
    for other in (x.contiguous(memory_format=torch.channels_last), wide):
        x_adv = attack().perturb(net, other)
        assert ((x_adv - expected).abs() < 1e-5).float().mean() > 0.99
    x = x[:1].expand(4, -1, -1, -1)  # one image in memory, four in the batch
    assert torch.equal(attack().perturb(net, x)[3:], attack().perturb(net, x)[:1])


def test_bfloat16_steps_add_up_although_each_alone_would_vanish():
    net, x = make_net().bfloat16(), images(dtype=torch.bfloat16)
    x_adv = attack(num_steps=10, step_size=0.005, epsilon=0.1).perturb(net, x)
    assert x_adv.dtype == torch.bfloat16
    change = (x_adv - x).float()[x.abs() > 1]  # spacing there: 0.0078 and 0.0156
    assert change.abs().max() <= 0.05 + 0.008
    assert (change.abs() > 0.03).float().mean() > 0.3


def test_the_grid_has_true_colours_in_reading_order():
    colours = torch.rand(7, 3, 1, 1)
    x = (colours.expand(7, 3, 4, 5) - MEAN) / STD
    grid = vis_grid(x, n_rows=3)
    assert grid.shape == (3, 3 * (4 + 2) + 2, 3 * (5 + 2) + 2)
    for i in range(7):
        top, left = 2 + i // 3 * 6, 2 + i % 3 * 7
        tile = grid[:, top : top + 4, left : left + 5]
        torch.testing.assert_close(tile, colours[i].expand(3, 4, 5))
    assert default_visfunction is vis_grid


@pytest.mark.parametrize(("n", "n_rows"), [(1, 10), (10, 10), (23, 10), (4, 1)])
def test_the_grid_is_torchvisions(n, n_rows):
    utils = pytest.importorskip("torchvision.utils", reason="torchvision is optional")
    pixels = torch.rand(n, 3, 6, 5, dtype=torch.float64)
    expected = utils.make_grid(pixels.float(), nrow=n_rows)
    if n == 1:  # torchvision leaves a single image without a frame
        expected = F.pad(expected, (2, 2, 2, 2))
    torch.testing.assert_close(vis_grid((pixels - MEAN) / STD, n_rows), expected)


def test_the_grid_clips_and_takes_any_precision_but_only_colour():
    grid = vis_grid(torch.full((2, 3, 4, 4), 50.0, dtype=torch.bfloat16, requires_grad=True))
    assert grid.max() == 1 and grid.dtype == torch.float32 and not grid.requires_grad
    with pytest.raises(ValueError, match="expected"):
        vis_grid(torch.zeros(2, 1, 4, 4))
