"""custom_blocks.py: its Attention, TransformerBlock and Mlp are those of student_code.py."""

from __future__ import annotations

import pytest
import torch

import custom_blocks
import student_code


@pytest.mark.parametrize("window_size", [0, 3])
@pytest.mark.parametrize("size", [(6, 9), (7, 5), (2, 2)])
def test_the_blocks_of_both_files_give_the_same(window_size, size):
    torch.manual_seed(0)
    theirs, ours = (
        module.TransformerBlock(12, 3, window_size=window_size, drop_path=0.1).double().eval()
        for module in (custom_blocks, student_code)
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, *size, 12, dtype=torch.double, requires_grad=True)
    found, expected = theirs(x), ours(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-6)


def test_student_code_imports_none_of_the_three():
    """It also works over the course's own custom_blocks, which lacks them."""
    for name in ("Attention", "TransformerBlock", "Mlp"):
        assert hasattr(custom_blocks, name)
    assert student_code.Attention.__module__ == student_code.TransformerBlock.__module__
    assert student_code.Attention.__module__ == "student_code"


def test_the_saliency_of_2022_is_one_map_per_image_and_leaves_the_network_alone():
    net = student_code.SimpleNet(num_classes=5).train()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        maps = student_code.default_attention(torch.nn.CrossEntropyLoss()).explain(net, x)
        grid = student_code.default_visfunction(x, vis_output=maps)
    assert maps.shape == (2, 1, 64, 64) and (maps >= 0).all() and maps.any()
    assert grid.shape[0] == 3 and grid.min() >= 0 and grid.max() <= 1
    assert net.training and all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "kernel, stride, padding",
    [((4, 4), (4, 4), (0, 0)), ((3, 2), (3, 2), (1, 2)), ((4, 4), (2, 2), (1, 1))],
)
def test_patch_embedding_is_its_convolution(kernel, stride, padding, memory_format):
    embed = custom_blocks.PatchEmbed(kernel, stride, padding, in_chans=3, embed_dim=5).double()
    embed.to(memory_format=memory_format)
    x = torch.randn(2, 3, 13, 15, dtype=torch.double).to(memory_format=memory_format)
    x.requires_grad_()
    found, expected = embed(x), embed.proj(x).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, expected)
    wanting = [x, *embed.parameters()]
    grads = [torch.autograd.grad(y.square().sum(), wanting) for y in (found, expected)]
    torch.testing.assert_close(*grads)
