"""Wrong answers to the assignment are caught by self_check.py, each with the right hint."""

from __future__ import annotations

import pytest
import torch
from answers import FOLDED, GRAD_WEIGHT, OURS, OVERWRITTEN, PROJECTED, STUDENTS, grade, module

from checks import attack, attention, conv

# ---- Wrong answers: (the check that catches it, the line, what becomes of it, the hint) ---------

OUT = "out = weight.flatten(1) @ columns"
GRAD_BIAS = "grad.sum((0, 2)) if bias"
GRAD_INPUT = "return grad_input, grad_weight"
PADDED = """p = ctx.padding; size = [s + 2 * p for s in ctx.size]
        grad_input = F.fold(grad_columns, size, weight.shape[2], stride=ctx.stride)"""

CONV = [
    ("forward", "out = out + bias[:, None]", "pass", "bias is not added"),
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
    ("gradient of the bias", GRAD_BIAS, "grad[-1].sum(1) if bias", "sum over the batch is missing"),
    ("gradient of the bias", GRAD_BIAS, "grad.mean((0, 2)) if bias",
     "mean over batch and positions"),
    ("gradient of the bias", GRAD_BIAS, "grad_output.sum(0) if bias",
     "sum over positions is missing"),
    ("gradient of the bias", "if bias is not None else None\n        return",
     "if ctx.needs_input_grad[0] else None\n        return", "alone differs from the numeric"),
    ("gradient of the bias", "grad_bias, None, None", "grad_bias", "five values"),
    ("gradient of the bias", "grad_weight, grad_bias", "grad_weight, None", "None in its place"),
    ("CustomConv2d", "torch.zeros(out_channels)) if bias", "torch.zeros(out_channels)) if True",
     "has parameters"),
    ("CustomConv2d", "nn.init.kaiming_uniform_(self.weight, a=5**0.5)",
     "nn.init.zeros_(self.weight)", "initialise it"),
    ("CustomConv2d", "self.bias, self.stride, self.padding)", "self.bias, 1, self.padding)",
     "the stride is ignored"),
    ("the CNN", "conv_op(", "nn.Conv2d(", "holds no CustomConv2d"),
]  # fmt: skip

SCORES = "(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5)"
JOINED = "(attn @ v).transpose(1, 2)"
READ = "3, self.num_heads, -1).permute(2, 0, 3, 1, 4)"
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
]  # fmt: skip

UNPARTITION = "window_unpartition(self.attn(x), self.window_size, pad_hw, (H, W))"
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
]  # fmt: skip

VIT = [
    ("shapes", "nn.Linear(embed_dim, num_classes)", "nn.Linear(embed_dim, 100)", "expected (3, 6)"),
    ("shapes", "x = self.patch_embed(x) +", "x = x - x.mean(0); x = self.patch_embed(x) +",
     "beside those of it alone"),
    ("every parameter", "self.patch_embed(x) + self.pos_embed", "self.patch_embed(x)", "pos_embed"),
    ("every parameter", "x.mean((1, 2))", "x.detach().mean((1, 2))", "the graph is cut"),
    ("learns", "x.mean((1, 2))", "x.mean((0, 1, 2)).expand(len(x), -1)", "the same logits"),
    ("learns", "x.mean((1, 2))", "x.detach().mean((1, 2)) * 0.01", "expected below"),
    ("networks survive", "nn.ModuleList(\n            [Trans",
     "list(\n            [Trans", "ModuleList"),
    ("networks survive", "nn.Parameter(torch.zeros(1, side, side, embed_dim))\n",
     "torch.zeros(1, side, side, embed_dim)\n", "must be in state_dict"),
]  # fmt: skip

STEP = "output = output - self.step_size * output.grad.sign()"
ATTACK = [
    ("approaches", STEP, STEP.replace("= output -", "= output +"), "wrong sign: it climbs"),
    ("approaches", STEP, STEP.replace("= output -", "= output.detach() +"),
     "wrong sign: it climbs"),
    ("stronger", STEP, STEP.replace("= output -", "= output +"), "wrong sign: it climbs"),
    ("approaches", "argmin(1)", "argmax(1)", "wrong sign and label"),
    ("stays within", PROJECTED, "pass", "projection is missing"),
    ("stays within", PROJECTED, PROJECTED.replace("input ", "output "), "projection is missing"),
    ("stays within", PROJECTED, f"{PROJECTED}; output = output.clamp(0, 1)", "is normalised"),
    ("stays within", "return output.detach()\n\n\ndefault_attack",
     "return input\n\n\ndefault_attack", "is the perturbed tensor returned"),
    ("steps", ".grad.sign()", ".grad", "sign is not taken"),
    ("steps", "self.step_size * output", "self.eps * output", "the size of epsilon"),
    ("steps", "self.step_size * output", "self.step_size / STD * output", "divided by std"),
    ("stays within", "self.loss_fn, self.num_steps = loss_fn, num_steps",
     "self.loss_fn, self.num_steps = loss_fn, num_steps; step_size = step_size / STD; "
     "epsilon = epsilon / STD", "divided by std"),
    ("stronger", ".grad.sign()", ".grad", "sign is not taken"),
    ("steps", PROJECTED, f"{PROJECTED}; break", "only one step"),
    ("network and images", PROJECTED, f"{PROJECTED}; input.copy_(output)", "clone them first"),
    ("network and images", "output = input.clone()", "output = input.clone(); model.eval()",
     "go back to the mode"),
    ("network and images", "output = input.clone()",
     "output = input.clone(); model.requires_grad_(False)", "never the network"),
    ("network and images", "model.zero_grad()",
     "torch.optim.SGD(model.parameters(), 0.1).step()", "never the network"),
    ("bonus: fit", "        model.zero_grad()\n", "", "parameter gradients are left behind"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "hint"), CONV + ATTENTION + BLOCKS + VIT + ATTACK)
def test_a_wrong_answer_is_caught_with_the_right_hint(name, old, new, hint):
    code = module(STUDENTS, (old, new))
    code.STD = attack.STD
    result = grade(code, name)
    assert result.score == 0 and hint in f"{result.problem} {result.hint}"


OUR_WRONG = [
    ("the CNN", "W += torch.mm(", "W = torch.mm(", "the gradient of features"),
    ("gradient of the bias", "g.sum((0, 2, 3))", "g[0].sum((1, 2))", "the first image alone"),
    ("forward", "inside = padded[:, padding : padding + H", "inside = padded[:, :H", "found"),
    ("softmax", "(q * self.scale) @", "q @", "scale is forgotten"),
    ("softmax", "q, k, v = qkv.permute(2, 0, 3, 1, 4)", "k, q, v = qkv.permute(2, 0, 3, 1, 4)",
     "q and k are swapped"),
    ("attention within", "self.window_size, pad_hw, (H, W))", "self.window_size, pad_hw, pad_hw)",
     "the padding is not removed"),
    ("approaches", "-1.0 if self.targeted", "1.0 if self.targeted", "wrong sign: it climbs"),
    ("approaches", "targeted: bool = True", "targeted: bool = False", "the likeliest label"),
    ("stays within", "x_adv = torch.minimum(torch.maximum(x_adv, lower), upper)", "pass",
     "projection is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "hint"), OUR_WRONG)
def test_the_same_mistakes_in_our_answer(name, old, new, hint):
    result = grade(module(OURS, (old, new)), name)
    assert result.score == 0 and hint in f"{result.problem} {result.hint}"


def test_a_wrong_number_comes_with_its_place_and_the_right_one():
    result = grade(module(STUDENTS, ("out = out + bias[:, None]", "pass")), "forward")
    code, case = module(STUDENTS), conv.CASES[0]
    right = code.custom_conv2d(*case.tensors(), case.S, case.P)[0, 0, 0, 0].item()
    wrong = right - case.tensors()[2][0].item()
    assert f"first at (0, 0, 0, 0): found {wrong:.6g}, expected {right:.6g}" in result.problem


def test_no_mistake_that_we_know_gives_the_right_answer():
    """Else its hint could be told for an answer that is wrong in another way."""
    net, (x, _) = attack.victim(), attack.images(8, seed=1)
    layer, tokens = attention.make(module(STUDENTS), attention.CASES[0])
    right = attention.attend(layer, tokens, 3)
    for hint, result in attention.mistakes_of(layer, tokens, 3).items():
        assert result().shape != right.shape or not torch.allclose(result(), right, atol=1e-3), hint
    assert attack.likely_mistake(attack.pgd(net, x), net, x) == ""
