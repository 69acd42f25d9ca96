"""checks/blocks.py: windows and residual branches, for any Attention."""

from __future__ import annotations

import pytest
from answers import OURS, STUDENTS, assert_caught, grade, module, problems

UNPARTITION = "window_unpartition(self.attn(x), self.window_size, pad_hw, (H, W))"
MLP_BRANCH = "return x + self.drop_path(self.mlp(self.norm2(x)))"

BLOCKS = [
    ("attention within", "pad_hw, (H, W))", "pad_hw, pad_hw)", "the padding is not removed"),
    ("attention within", "if self.window_size > 0:", "if False:", "window_size is ignored"),
    ("attention within", UNPARTITION,
     "self.attn(x).reshape(-1, *pad_hw, x.shape[-1])[:, :H, :W]", "of another window"),
    ("attention within", UNPARTITION, UNPARTITION.replace("(x)", "(x).transpose(1, 2)"),
     "mixed up within"),
    ("residual branches", "x = shortcut + self.drop_path(x)", "x = self.drop_path(x)",
     "a residual connection is missing"),
    ("residual branches", "return x + self.drop_path(self.mlp",
     "return x + x + self.drop_path(self.mlp", "added twice"),
    ("residual branches", "            x = self.attn(x)\n", "            pass\n", "attends to all"),
    ("windows cut", "class CustomConv2DFunction", """def window_unpartition(w, ws, pad_hw, hw):
    B = len(w) * ws * ws // (pad_hw[0] * pad_hw[1])
    x = w.view(B, pad_hw[0] // ws, pad_hw[1] // ws, ws, ws, -1)
    return x.transpose(2, 3).reshape(B, *pad_hw, -1)
class CustomConv2DFunction""", "padding not removed"),
    ("windows cut", "class CustomConv2DFunction", """def window_partition(x, ws):
    B, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, -W % ws, 0, -H % ws))
    return x.reshape(-1, ws, ws, C), x.shape[1:3]
class CustomConv2DFunction""", "transpose rows and windows first"),
    ("residual branches", MLP_BRANCH, MLP_BRANCH.replace("return x +", "return shortcut +"),
     "attention is lost"),
    ("residual branches", MLP_BRANCH, "return x", "the MLP is not used"),
    ("residual branches", "self.mlp(self.norm2(x))", "self.mlp(x)", "norm2 is not used"),
    ("residual branches", "self.mlp(self.norm2(x))", "self.mlp(self.norm1(x))",
     "norm1 is used in place of norm2"),
    ("residual branches", "shortcut, x = x, self.norm1(x)", "shortcut, x = x, x",
     "norm1 is not used"),
    ("residual branches", "shortcut, x = x, self.norm1(x)", "shortcut = x = self.norm1(x)",
     "starts behind norm1"),
    ("residual branches", "x = shortcut + self.drop_path(x)", "x = shortcut",
     "its output is not used"),
    ("residual branches", "DropPath(drop_path) if drop_path > 0.0 else ", "", "drops nothing"),
    ("residual branches", "x = shortcut + self.drop_path(x)", "x = shortcut + x",
     "one of the two residual branches"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "hint"), BLOCKS)
def test_a_wrong_answer_is_caught_with_the_right_hint(name, old, new, hint):
    assert_caught(STUDENTS, name, hint, (old, new))


OURS_WRONG = [
    ("attention within", "self.window_size, pad_hw, (H, W))", "self.window_size, pad_hw, pad_hw)",
     "the padding is not removed"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "hint"), OURS_WRONG)
def test_the_same_mistakes_in_our_answer(name, old, new, hint):
    assert_caught(OURS, name, hint, (old, new))


def test_wrong_attention_costs_the_block_nothing():
    code = module(STUDENTS, ("q.shape[-1] ** -0.5", "1"), ("q, k, v = ", "k, q, v = "))
    assert problems(code, "blocks") == {}


def test_attention_that_does_nothing_yet_gets_nothing():
    code = module(STUDENTS, ("        B, H, W, C = x.shape\n", "        return x\n"))
    assert len(problems(code, "blocks")) == 3


def test_unmasked_padding_is_a_remark():
    assert "pad a window act as keys" in grade(module(STUDENTS), "attention within").remarks[0]
    assert grade(module(OURS), "attention within").remarks == ()


def test_stochastic_depth_may_draw_once_for_a_whole_batch():
    """Huang et al., 2016, drop a branch for the mini-batch."""
    dropping = "from torchvision.ops import StochasticDepth\n"
    edit = ("DropPath(drop_path) if", 'StochasticDepth(drop_path, "batch") if')
    assert grade(module(dropping + STUDENTS, edit), "residual branches").problem == ""


EDITION_2022 = "from custom_blocks import TransformerBlock\n"


def test_the_blocks_of_2022_are_not_graded():
    """TransformerBlock is imported from custom_blocks: its points are neither won nor lost."""
    start, end = STUDENTS.index("class Attention"), STUDENTS.index("class SimpleViT")
    code = module(EDITION_2022 + STUDENTS[:start] + STUDENTS[end:])
    for name in ("softmax", "residual branches", "attention within"):
        result = grade(code, name)
        assert (result.score, result.max_score, result.problem) == (0, 0, "")
        assert "custom_blocks (editions 2022 and 2023)" in result.skipped
    assert problems(code, "vit") == {}
