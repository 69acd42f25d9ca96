"""checks/vit.py: shapes, what the logits depend on, learning, checkpoints."""

from __future__ import annotations

import pytest
from answers import OURS, STUDENTS, assert_caught, grade, module

VIT = [
    ("shapes", "nn.Linear(embed_dim, num_classes)", "nn.Linear(embed_dim, 100)", "expected (3, 6)"),
    ("shapes", "x = self.patch_embed(x) +", "x = x - x.mean(0); x = self.patch_embed(x) +",
     "against those of it alone"),
    ("every parameter", "self.patch_embed(x) + self.pos_embed", "self.patch_embed(x)", "pos_embed"),
    ("every parameter", "x.mean((1, 2))", "x.detach().mean((1, 2))", "the graph is cut"),
    ("learns", "x.mean((1, 2))", "x.mean((0, 1, 2)).expand(len(x), -1)", "the same logits"),
    ("learns", "x.mean((1, 2))", "x.detach().mean((1, 2)) * 0.01", "expected below"),
    ("networks survive", "nn.ModuleList(\n            [Trans",
     "list(\n            [Trans", "ModuleList"),
    ("networks survive", "nn.Parameter(torch.zeros(1, side, side, embed_dim))\n",
     "torch.zeros(1, side, side, embed_dim)\n", "must be in state_dict"),
    ("the whole image", "x = self.patch_embed(x) +",
     "x = x * (torch.arange(128) < 64); x = self.patch_embed(x) +",
     "50% of the image, first on the pixels from row 0, column 64"),
    ("the whole image", "x = self.patch_embed(x) +",
     "x = x[:, :1].expand(-1, 3, -1, -1); x = self.patch_embed(x) +",
     "1 of the image's 3 channels"),
    ("learns", "return self.fc(x.mean((1, 2)))", "return self.fc(x.mean((1, 2))).softmax(-1)",
     "ends in a softmax"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "hint"), VIT)
def test_a_wrong_answer_is_caught_with_the_right_hint(name, old, new, hint):
    assert_caught(STUDENTS, name, hint, (old, new))


# Ours takes window_block_indexes and drop_path_rate.
OURS_WRONG = [
    ("the whole image", "window_size if i in window_block_indexes else 0", "window_size",
     "windowed are (0, 1, 2)"),
    ("the whole image", "window_size if i in window_block_indexes else 0", "0", "windowed are ()"),
    ("the whole image", "i in window_block_indexes", "i not in window_block_indexes",
     "windowed are (0, 2)"),
    ("the whole image", "drop_path[i],", "0.0,", "drops nothing in training mode"),
    ("shapes", "return self.head(", "return x; self.head(", "expected (3, 6)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "hint"), OURS_WRONG)
def test_the_same_mistakes_in_our_answer(name, old, new, hint):
    assert_caught(OURS, name, hint, (old, new))


RIGHT = {
    "tokens flattened before qkv": [("self.qkv(x).reshape", "self.qkv(x.reshape(-1, C)).reshape")],
    "large patches": [("patch_size: int = 16", "patch_size: int = 32")],
    "stochastic depth of a batch": [
        ("import functools", "import functools\nfrom torchvision.ops import StochasticDepth"),
        ("DropPath(drop_path) if", 'StochasticDepth(drop_path, "batch") if'),
    ],
}  # fmt: skip


@pytest.mark.parametrize("edits", RIGHT.values(), ids=RIGHT)
def test_windows_and_drop_path_in_other_words_get_all_points(edits):
    assert grade(module(OURS, *edits), "the whole image").problem == ""


def test_dropout_is_no_drop_path():
    edits = (("drop_path[i],", "0.0,"), ("self.norm = ", "self.drop = nn.Dropout(); self.norm = "),
             ("self.head(self.norm(x)", "self.head(self.drop(self.norm(x))"))  # fmt: skip
    assert_caught(OURS, "the whole image", "drops nothing in training mode", *edits)


def test_a_vit_that_reads_one_column_of_windowed_tokens_is_caught():
    blind = [("window_size if i in window_block_indexes else 0", "window_size"),
             ("self.norm(x).mean(dim=(1, 2))", "self.norm(x.mean(dim=1))[:, 0]")]  # fmt: skip
    assert_caught(OURS, "the whole image", "50% of the image", *blind)
