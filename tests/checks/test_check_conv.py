"""checks/conv.py: right convolutions get all points, each wrong one costs its own, with a hint."""

from __future__ import annotations

import pytest
from answers import (
    FOLDED,
    GRAD_WEIGHT,
    OURS,
    OUTPUT,
    OVERWRITTEN,
    STUDENTS,
    UNFOLD,
    assert_caught,
    grade,
    module,
    problems,
)

from checks import conv

OUT = "out = weight.flatten(1) @ columns"
GRAD_BIAS = "grad.sum((0, 2)) if bias"
GRAD_INPUT = "return grad_input, grad_weight"
PADDED = """p = ctx.padding; size = [s + 2 * p for s in ctx.size]
        grad_input = F.fold(grad_columns, size, weight.shape[2], stride=ctx.stride)"""

VIEW = "return out.reshape(len(out), -1, *sides)"
SQUARE = "sides = [int(out.shape[-1] ** 0.5)] * 2\n        return F.fold(out, sides, 1)"
NO_GUARD = [("if bias is not None:\n            out", "if True:\n            out")]
LARGE_SIZES = "size = [int((out.shape[-1]) ** 0.5)] * 2"

CONV = [
    ("forward", "out = out + bias[:, None]", "pass", "bias is not added"),
    ("forward", "out + bias[:, None]", "out + 2 * bias[:, None]", "added more than once"),
    ("forward", "return F.fold(out, sides, 1)", "return F.fold(out, sides, 1).float()",
     "fixed dtype"),
    ("forward", OUT, "out = weight.flip(2, 3).flatten(1) @ columns", "turned by 180°"),
    ("forward", OUT, "out = weight.mT.flatten(1) @ columns", "rows and columns of the kernel"),
    ("forward", OUT, "out = weight.permute(0, 2, 3, 1).flatten(1) @ columns",
     "weight is flattened as (K, K, C_i)"),
    ("forward", "return F.fold(out, sides, 1)", "return out.mT.reshape(len(out), -1, *sides)",
     "channels and positions are mixed"),
    ("forward", "return F.fold(out, sides, 1)", "return out.reshape(len(out), -1, *sides[::-1]).mT",
     "the output is read column by column"),
    ("forward", "k, padding=padding, stride=stride)\n", "k, padding=padding)\n", "raises"),
    ("forward", "return F.fold(out, sides, 1)",
     "return F.conv2d(input_feats, weight, bias, stride, padding)", "fold, unfold and matrix"),
    ("memory layouts", "grad = grad_output.flatten(2)",
     "grad = grad_output.view(*grad_output.shape[:2], -1)", "use reshape()"),
    ("memory layouts", "return F.fold(out, sides, 1)", "return F.fold(out, sides, 1).double()",
     "torch.float32 tensors is torch.float64"),
    ("gradient of the input", FOLDED, PADDED, "padding not removed"),
    ("gradient of the input", FOLDED,
     PADDED + "\n        grad_input = grad_input[..., : ctx.size[0], : ctx.size[1]]",
     "padding not removed"),
    ("gradient of the input", FOLDED, OVERWRITTEN, "add them up"),
    ("gradient of the input", "grad_columns = weight", "grad_columns = weight.flip(2, 3)",
     "turned by 180°"),
    ("gradient of the input", GRAD_INPUT, "return None, grad_weight", "None in its place"),
    ("gradient of the weight", "grad, columns).view", "grad[-1:], columns[-1:]).view",
     "sum over the batch is missing: this is the gradient of the last"),
    ("gradient of the weight", "grad, columns).view", "grad / len(grad), columns).view",
     "mean over the batch"),
    ("gradient of the weight", GRAD_WEIGHT, f"{GRAD_WEIGHT}.flip(2, 3)", "turned by 180°"),
    ("gradient of the weight", GRAD_WEIGHT, GRAD_WEIGHT.replace("view_as(weight)", "sum(0)"),
     "shape ("),
    ("gradient of the weight", GRAD_WEIGHT, f"2 * {GRAD_WEIGHT}", "counted twice"),
    ("gradient of the input", GRAD_INPUT, "return 2 * grad_input, grad_weight", "counted twice"),
    ("gradient of the input", GRAD_INPUT, "return grad_input[..., -0:0, -0:0], grad_weight",
     "is empty for padding 0"),
    ("gradient of the bias", GRAD_BIAS, "grad[-1].sum(1) if bias", "sum over the batch is missing"),
    ("gradient of the bias", GRAD_BIAS, "grad.mean((0, 2)) if bias",
     "mean over batch and positions"),
    ("gradient of the bias", GRAD_BIAS, "grad_output.sum(0) if bias",
     "sum over positions is missing"),
    ("gradient of the bias", "if bias is not None else None\n        return",
     "if ctx.needs_input_grad[0] else None\n        return", "where no other tensor wants one"),
    ("gradient of the bias", "grad_bias, None, None", "grad_bias", "five values"),
    ("gradient of the bias", "grad_weight, grad_bias", "grad_weight, None", "None in its place"),
    ("without a bias", "torch.zeros(out_channels)) if bias", "torch.zeros(out_channels)) if True",
     "has parameters"),
    ("CustomConv2d", "nn.init.kaiming_uniform_(self.weight, a=5**0.5)",
     "nn.init.zeros_(self.weight)", "initialise it"),
    ("CustomConv2d", "self.bias, self.stride, self.padding)", "self.bias, 1, self.padding)",
     "the stride is ignored"),
    ("the CNN", "conv_op(", "nn.Conv2d(", "holds no CustomConv2d"),
    ("forward", OUTPUT, SQUARE, "square root of the number of positions"),
    ("gradient of the input", "grad_columns, ctx.size,", "grad_columns, (ctx.size[0],) * 2,",
     "square root of the number of positions"),
    ("CustomConv2d", OUTPUT, VIEW, "the output is a view"),
    ("the CNN", OUTPUT, VIEW, "the output is a view"),
    ("without a bias", "if bias is not None:\n            out", "if True:\n            out",
     "bias is None in a layer without one"),
    ("without a bias", "torch.zeros(out_channels)) if bias", "torch.zeros(out_channels)) if True",
     "has parameters"),
    ("CustomConv2d", "return custom_conv2d(x,", "return F.conv2d(x,", "convolution is called"),
    ("without a bias", OUTPUT, "return F.conv2d(input_feats, weight, bias, stride, padding)",
     "convolution is called"),
    ("the CNN", "conv_op(16, 24", "nn.Conv2d(16, 24", "1 of 2 convolutions are nn.Conv2d"),
    ("the CNN", "x = self.body(x)", "x = self.body(x + F.conv2d(x, torch.ones(3, 3, 1, 1).to(x)))",
     "forward calls"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "hint"), CONV)
def test_a_wrong_answer_is_caught_with_the_right_hint(name, old, new, hint):
    assert_caught(STUDENTS, name, hint, (old, new))


OURS_WRONG = [
    ("the CNN", "W += torch.mm(", "W = torch.mm(", "the gradient of features"),
    ("gradient of the bias", "g.sum((0, 2, 3))", "g[0].sum((1, 2))", "the first image alone"),
    ("forward", "inside = padded[:, padding : padding + H", "inside = padded[:, :H", "found"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "hint"), OURS_WRONG)
def test_the_same_mistakes_in_our_answer(name, old, new, hint):
    assert_caught(OURS, name, hint, (old, new))


def test_a_wrong_number_comes_with_its_place_and_the_right_one():
    result = grade(module(STUDENTS, ("out = out + bias[:, None]", "pass")), "forward")
    one = conv.samples(2024)[0]
    right = one.output()[0, 0, 0, 0].item()
    wrong = right - one.b[0].item()
    assert f"first at (0, 0, 0, 0): found {wrong:.6g}, expected {right:.6g}" in result.problem


SLIDES = """windows = F.pad(input_feats, (padding,) * 4).unfold(2, k, stride).unfold(3, k, stride)
        columns = windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)"""
PER_IMAGE = "sum(g @ c.t() for g, c in zip(grad, columns)).view_as(weight)"
RIGHT = {
    "a student's": [],
    "windows by Tensor.unfold": [(UNFOLD, SLIDES), (GRAD_WEIGHT, PER_IMAGE)],
    "overlaps added in loops": [(FOLDED, OVERWRITTEN.replace("] = patches", "] += patches"))],
}


@pytest.mark.parametrize("edits", RIGHT.values(), ids=RIGHT)
def test_a_right_convolution_in_other_words_gets_all_points(edits):
    assert problems(module(STUDENTS, *edits), "conv") == {}


def test_a_crash_without_a_bias_costs_the_bias_alone():
    assert [*problems(module(STUDENTS, *NO_GUARD), "conv")] == [
        "without a bias: forward and backward"
    ]


def test_view_on_channels_last_weights_is_a_remark():
    code = module(STUDENTS, (OUT, "out = weight.view(len(weight), -1) @ columns"))
    result = grade(code, "memory layouts")
    assert result.score == result.check.points and "reshape()" in result.remarks[0]


# ---- Networks ---------------------------------------------------------------------------------

DEEP = """

class Deep(nn.Module):
    def __init__(self, conv_op=nn.Conv2d, num_classes=100):
        super().__init__()
        layers = []
        for i, o, k, s in ((3, 64, 7, 2), (64, 128, 3, 2), (128, 256, 3, 2), (256, 512, 3, 2)):
            layers += [conv_op(i, o, kernel_size=k, stride=s, padding=k // 2), nn.BatchNorm2d(o),
                       nn.ReLU(inplace=True), nn.MaxPool2d(3, 1, 1)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.depthwise = nn.Conv2d(512, 512, 1, groups=512)
        self.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, num_classes))

    def forward(self, x):
        return self.fc(self.depthwise(self.body(x)[..., None, None]).flatten(1))


default_cnn_model = Deep
"""
OBLONG = (
    "conv_op(16, 24",
    "nn.Conv2d(16, 16, (1, 3), padding=(0, 1)),\n            conv_op(16, 24",
)
FLOAT32 = ("x = self.body(x)", "x = self.body(x.float())")


def test_a_deep_network_on_a_right_convolution_gets_all_points():
    """In float32 its gradients differ by 1 %; CustomConv2d knows no groups."""
    assert grade(module(STUDENTS + DEEP), "the CNN").problem == ""


def test_convolutions_that_customconv2d_cannot_do_stay_torchs():
    assert grade(module(STUDENTS, OBLONG), "the CNN").problem == ""


def test_a_network_that_works_in_float32_alone_gets_all_points():
    assert grade(module(STUDENTS, FLOAT32), "the CNN").problem == ""
