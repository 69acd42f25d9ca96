"""Attention and windows against slow references in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import student_code
from custom_blocks import window_partition, window_unpartition
from student_code import Attention, TransformerBlock

SMALL, LARGE = (4, 5), (9, 8)  # tokens on either side of MAX_TOKENS_EXPLICIT


def attention_by_hand(layer: Attention, tokens: torch.Tensor) -> torch.Tensor:
    """One sample `(N, C)`, head by head and query by query."""
    N, C = tokens.shape
    d = C // layer.num_heads
    qkv = layer.qkv(tokens).view(N, 3, layer.num_heads, d)  # the contract's layout
    out = torch.zeros_like(tokens)
    for h in range(layer.num_heads):
        q, k, v = qkv[:, 0, h], qkv[:, 1, h], qkv[:, 2, h]
        for n in range(N):
            weights = torch.exp(k @ q[n] / d**0.5)
            out[n, h * d : (h + 1) * d] = (weights / weights.sum()) @ v
    return layer.proj(out)


def layer_and_tokens(size, dim=12, heads=3, batch=2, **kwargs):
    torch.manual_seed(sum(size))
    layer = Attention(dim, heads, **kwargs).double()
    return layer, torch.randn(batch, *size, dim, dtype=torch.float64)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("size", [SMALL, LARGE, (1, 1)])
def test_attention_is_the_softmax_of_its_definition(size, qkv_bias):
    layer, x = layer_and_tokens(size, qkv_bias=qkv_bias)
    assert (layer.qkv.bias is not None) == qkv_bias
    expected = torch.stack([attention_by_hand(layer, sample.flatten(0, 1)) for sample in x])
    torch.testing.assert_close(layer(x), expected.view_as(x))


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_masked_tokens_are_as_good_as_absent(size):
    layer, x = layer_and_tokens(size)
    mask = torch.rand(2, *size) < 0.6
    mask[:, 0, 0] = True
    out = layer(x, mask)
    for sample, real, got in zip(x, mask, out, strict=True):
        torch.testing.assert_close(got[real], attention_by_hand(layer, sample[real]))


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_attention_agrees_with_torchs_own(size):
    layer, x = layer_and_tokens(size)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = layer.qkv.weight, layer.qkv.bias
    theirs.out_proj.load_state_dict(layer.proj.state_dict())
    mask = torch.rand(2, *size) < 0.6
    mask[:, 0, 0] = True
    tokens = x.flatten(1, 2)
    expected, _ = theirs(tokens, tokens, tokens, key_padding_mask=~mask.flatten(1))
    torch.testing.assert_close(layer(x, mask), expected.view_as(x))


@pytest.mark.parametrize("masked", [False, True])
def test_explicit_and_fused_attention_give_the_same_numbers(masked, monkeypatch):
    layer, x = layer_and_tokens((6, 6))
    mask = (torch.rand(2, 6, 6) < 0.7).index_fill(2, torch.tensor(0), True) if masked else None
    results = []
    for limit in (0, 10**9):
        monkeypatch.setattr(student_code, "MAX_TOKENS_EXPLICIT", limit)
        x.requires_grad_(True)
        out = layer(x, mask)
        gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        results.append([out, *gradients])
    for explicit, fused in zip(*results, strict=True):
        torch.testing.assert_close(explicit, fused)


def test_gradients_of_attention_are_the_numeric_ones():
    layer, x = layer_and_tokens((2, 3), dim=4, heads=2)
    mask = torch.tensor([[[True, True, False], [True, False, True]]] * 2)
    assert torch.autograd.gradcheck(lambda x: layer(x, mask), x.requires_grad_(True))


def test_attention_in_bfloat16_stays_near_float64():
    layer, x = layer_and_tokens(LARGE)
    expected = layer(x)
    out = layer.bfloat16()(x.bfloat16(), torch.ones(2, *LARGE, dtype=torch.bool))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, atol=0.03, rtol=0.05)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="10 is not divisible by num_heads 4"):
        Attention(10, 4)


@given(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_windows_hold_the_right_tokens_and_go_back(B, H, W, ws):
    x = torch.arange(1.0, B * H * W * 2 + 1).view(B, H, W, 2)
    windows, (Hp, Wp) = window_partition(x, ws)
    rows, columns = -(-H // ws), -(-W // ws)
    assert (Hp, Wp) == (rows * ws, columns * ws)
    assert windows.shape == (B * rows * columns, ws, ws, 2)
    for i, window in enumerate(windows):
        b, r, c = i // (rows * columns), i // columns % rows, i % columns
        real = x[b, r * ws : (r + 1) * ws, c * ws : (c + 1) * ws]
        assert torch.equal(window[: real.shape[0], : real.shape[1]], real)
        assert window.count_nonzero() == real.numel()  # the rest is zero
    assert torch.equal(window_unpartition(windows, ws, (Hp, Wp), (H, W)), x)


@pytest.mark.parametrize(
    ("size", "ws"),
    [((8, 8), 4), ((5, 7), 4), ((3, 3), 4), ((9, 4), 2), ((10, 11), 9)],  # 9x9 tokens: fused
)
def test_a_windowed_block_attends_to_the_real_tokens_of_its_window_alone(size, ws):
    torch.manual_seed(1)
    block = TransformerBlock(12, 3, window_size=ws).double()
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    normed, attended = block.norm1(x), torch.zeros_like(x)
    for b in range(2):
        for i in range(0, size[0], ws):
            for j in range(0, size[1], ws):
                window = normed[b, i : i + ws, j : j + ws]
                out = attention_by_hand(block.attn, window.flatten(0, 1))
                attended[b, i : i + ws, j : j + ws] = out.view_as(window)
    middle = x + attended
    expected = middle + block.mlp(block.norm2(middle))
    torch.testing.assert_close(block(x), expected)


def test_a_block_without_windows_attends_globally_and_takes_other_layers():
    torch.manual_seed(0)
    block = TransformerBlock(
        12, 3, mlp_ratio=2.0, qkv_bias=False, norm_layer=nn.Identity, act_layer=nn.ReLU
    ).double()
    assert block.mlp.fc1.out_features == 24
    x = torch.randn(2, 3, 4, 12, dtype=torch.float64)
    middle = x + torch.stack([attention_by_hand(block.attn, s.flatten(0, 1)) for s in x]).view_as(x)
    expected = middle + block.mlp.fc2(block.mlp.fc1(middle).relu())
    torch.testing.assert_close(block(x), expected)


def test_stochastic_depth_skips_both_branches():
    block = TransformerBlock(12, 3, drop_path=0.999999).train()
    x = torch.randn(4, 3, 4, 12)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)
