"""checks/attention.py: right attention gets all points, wrong attention a hint."""

from __future__ import annotations

import pytest
import torch
from answers import OURS, STUDENTS, assert_caught, module, problems

from checks import attention

SCORES = "(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5)"
JOINED = "(attn @ v).transpose(1, 2)"
READ = "3, self.num_heads, -1).permute(2, 0, 3, 1, 4)"
READ_HEADS = ".permute(2, 0, 3, 1, 4)"
PER_HEAD = "return self.proj((attn @ v).transpose(1, 2).reshape(B, H, W, C))"

ATTENTION = [
    ("softmax", SCORES, "(q @ k.transpose(-2, -1))", "scale is forgotten"),
    ("softmax", "q.shape[-1] ** -0.5", "C ** -0.5", "square root of dim"),
    ("softmax", "q.shape[-1] ** -0.5", "q.shape[-1] ** -1", "not by its square root"),
    ("softmax", "q.shape[-1] ** -0.5", "q.shape[-1] ** 0.5", "is multiplied"),
    ("softmax", READ, "self.num_heads, 3, C // self.num_heads).permute(3, 0, 2, 1, 4)",
     "wrong head order: the output of qkv is (3, num_heads, head_dim)"),
    ("softmax", READ, "3, C // self.num_heads, self.num_heads).permute(2, 0, 4, 1, 3)",
     "(3, head_dim, num_heads)"),
    ("softmax", JOINED, "(attn @ v)", "heads are joined before"),
    ("softmax", ".softmax(-1)", ".softmax(-2)", "over the queries"),
    ("softmax", f"{SCORES}.softmax(-1)", SCORES, "softmax is missing"),
    ("softmax", "q, k, v = ", "q, v, k = ", "k and v are swapped"),
    ("softmax", "return self.proj(", "return (", "`proj` is missing"),
    ("large scores", f"attn = {SCORES}.softmax(-1)",
     f"attn = {SCORES}.exp(); attn = attn / attn.sum(-1, keepdim=True)", "subtract the largest"),
    ("gradients", "q, k, v = qkv.unbind(0)", "q, k, v = qkv.unbind(0); k = k.detach()",
     "no gradient goes through k"),
    ("gradients", "qkv = self.qkv(x)", "qkv = self.qkv(x.detach())", "the graph is cut"),
    ("softmax", "self.qkv", "self.to_qkv", "no Linear called qkv"),
    ("softmax", PER_HEAD, "return self.proj((attn @ v).flatten(0, 1).unflatten(1, (H, W)))",
     "heads are left in the batch axis"),
    ("softmax", PER_HEAD, "out = (attn @ v).reshape(self.num_heads, B, H * W, -1)\n"
     "        return self.proj(out.permute(1, 2, 0, 3).reshape(B, H, W, C))",
     "left in the batch axis"),
    ("softmax", JOINED, "(attn @ v).permute(0, 2, 3, 1)", "heads are transposed"),
    ("softmax", READ_HEADS, ".permute(2, 0, 1, 3, 4)", "each token attends over its own heads"),
    ("softmax", ".reshape(B, H, W, C))", ".reshape(B, H * W, C))", "place on the grid"),
    ("softmax", "return self.proj(", "return x; (", "returned unchanged"),
    ("softmax", f"{SCORES}.softmax(-1)", "(q @ k.mT).softmax(-2)", "; and the softmax runs over"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "hint"), ATTENTION)
def test_a_wrong_answer_is_caught_with_the_right_hint(name, old, new, hint):
    assert_caught(STUDENTS, name, hint, (old, new))


OURS_WRONG = [
    ("softmax", "(q * self.scale) @", "q @", "scale is forgotten"),
    ("softmax", "q, k, v = qkv.permute(2, 0, 3, 1, 4)", "k, q, v = qkv.permute(2, 0, 3, 1, 4)",
     "q and k are swapped"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "hint"), OURS_WRONG)
def test_the_same_mistakes_in_our_answer(name, old, new, hint):
    assert_caught(OURS, name, hint, (old, new))


def test_no_known_mistake_gives_the_right_answer():
    """Else its hint could be given to an answer that is wrong in another way."""
    one = attention.values(2024)[0]
    right = attention.attend(one)
    for hint, result in attention.mistakes_of(one).items():
        assert result().shape != right.shape or not torch.allclose(result(), right, atol=1e-3), hint


EXPLICIT = """attn = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, H, W, C))"""
EINSUM = """attn = torch.einsum("bhnd,bhmd->bhnm", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        return self.proj(torch.einsum("bhnm,bhmd->bnhd", attn, v).reshape(B, H, W, C))"""
FUSED = (
    "return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C))"
)


@pytest.mark.parametrize("words", [EXPLICIT, EINSUM, FUSED], ids=["explicit", "einsum", "fused"])
def test_right_attention_in_other_words_gets_all_points(words):
    assert problems(module(STUDENTS, (EXPLICIT, words)), "attention") == {}
