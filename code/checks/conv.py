"""Part I: the convolution, its three gradients, its module and a network made of it.

Expected values are torch's own, in double precision on small tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from checks.grading import (
    DTYPE,
    Check,
    CheckFailed,
    Findings,
    Mistakes,
    attempt,
    compare,
    expect,
    find,
    value,
)

NAMES = ("input_feats", "weight", "bias")
TOL = 1e-8  # of float64
INVALID = re.compile(r"index (\d) - got \[([\d, ]*)\] but expected shape compatible with \[(.*)\]")

NO_STRIDE = "the stride is ignored: window (i, j) starts at pixel (i * stride, j * stride)"
NO_BIAS = "bias is None in a layer without one (bias=False): add it only if it is not None"
SQUARE = (
    "right where the output is square: is a side taken as the square root of the number of "
    "positions, or one side for both? Each is (size + 2 * padding - K) // stride + 1"
)


class Case(NamedTuple):
    """Small, for answers in Python loops; all sizes differ, so that a mix-up shows."""

    K: int = 3
    S: int = 1
    P: int = 1
    bias: bool = True
    N: int = 2
    C_i: int = 4
    C_o: int = 3
    H: int = 7
    W: int = 6

    def __str__(self) -> str:
        text = f"{self.K}x{self.K} kernel, stride {self.S}, padding {self.P}"
        return text if self.bias else f"{text}, no bias"


CASES = [Case(K, S, P) for K, S, P in product((3, 1, 2, 5), (1, 2, 3), (1, 0, 2))]
CASES += [Case(N=1), Case(C_i=1, C_o=1), Case(H=3, W=3, P=0), Case(P=4), Case(7, 2, 3, H=12)]
CASES += [Case(H=6), Case(3, 2, 1, H=8, W=8)]
WITHOUT_BIAS = [Case(bias=False), Case(2, 2, 0, bias=False)]


class Sample(NamedTuple):
    """A case with its tensors."""

    case: Case
    x: Tensor  # (N, C_i, H, W)
    w: Tensor  # (C_o, C_i, K, K)
    b: Tensor | None  # (C_o,)
    g: Tensor  # (N, C_o, H_o, W_o), the incoming gradient

    def leaves(self) -> list[Tensor | None]:
        """x, w and b, each requiring a gradient."""
        return [None if t is None else t.clone().requires_grad_() for t in (self.x, self.w, self.b)]

    def square(self) -> bool | None:
        """True if x and g are square, False if g is oblong, else None."""
        x, g = (t.shape[2] == t.shape[3] for t in (self.x, self.g))
        return g if x == g or not g else None

    def output(self) -> Tensor:
        """torch's."""
        return F.conv2d(self.x, self.w, self.b, self.case.S, self.case.P)

    def gradient(self, which: int) -> Tensor:
        """torch's gradient of x, w or b."""
        tensors = self.leaves()
        y = F.conv2d(*tensors, self.case.S, self.case.P)
        return torch.autograd.grad(y, tensors[which], self.g)[0]


def sample(case: Case, seed: int, dtype: torch.dtype = torch.double) -> Sample:
    """Draw the tensors of a case."""
    random = torch.Generator().manual_seed(1000 * seed + case.K)
    H_o, W_o = ((size + 2 * case.P - case.K) // case.S + 1 for size in (case.H, case.W))
    shapes = (
        (case.N, case.C_i, case.H, case.W),
        (case.C_o, case.C_i, case.K, case.K),
        (case.C_o,),
        (case.N, case.C_o, H_o, W_o),
    )
    x, w, b, g = (torch.randn(shape, generator=random, dtype=dtype) for shape in shapes)
    return Sample(case, x, w, b if case.bias else None, g)


def samples(seed: int) -> list[Sample]:
    """The inputs of the checks of the forward pass and the gradients."""
    return [sample(case, seed) for case in CASES]


class Watch(TorchDispatchMode):
    """Notes torch's own convolutions, which are what the answer has to replace."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in str(func):
            self.forbidden = str(func)
        return func(*args, **kwargs or {})


class Refuse(Watch):
    """Raises CheckFailed when one was called."""

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        problem = f"torch's own convolution is called: {self.forbidden}"
        expect(not self.forbidden, problem, "fold, unfold and matrix products are allowed")


def judge_each(
    inputs: Sequence[Sample], findings: Findings, judge_one: Callable[[Sample, Any], None]
) -> None:
    """Raise the first failure; with the hint SQUARE if just the oblong cases fail."""
    failures = []
    for one, finding in zip(inputs, findings["cases"], strict=True):
        try:
            judge_one(one, finding)
        except CheckFailed as e:
            failures.append((one.square(), e))
    if failures:
        first, oblong = failures[0][1], sum(one.square() is False for one in inputs)
        alone = sum(square is False for square, _ in failures) == oblong
        alone = alone and all(square is not True for square, _ in failures)
        raise CheckFailed(str(first), first.hint or (SQUARE if alone else ""))


# ---- Forward ---------------------------------------------------------------------------------


def probe_forward(code: ModuleType, inputs: Sequence[Sample]) -> Findings:
    """The output of each case."""
    return {"cases": [attempt(forward, code, one.case, one.x, one.w, one.b) for one in inputs]}


def forward(code: ModuleType, case: Case, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The student's output, by no convolution of torch's."""
    with Refuse():
        return find(code, "custom_conv2d")(x, w, b, case.S, case.P)


def judge_forward(inputs: Sequence[Sample], findings: Findings) -> None:
    """Against torch's convolution."""

    def judge_one(one: Sample, finding: object) -> None:
        what, right = f"the output ({one.case})", one.output()
        compare(what, value(finding, what), right, forward_mistakes(one, right), tol=TOL)

    judge_each(inputs, findings, judge_one)


def forward_mistakes(one: Sample, right: Tensor) -> Mistakes:
    """What each would make of the output."""
    (x, w, b), S, P = one[1:4], one.case.S, one.case.P
    C_o, C_i, K, _ = w.shape
    columns_last = w.flatten(1).view(C_o, K, K, C_i).permute(0, 3, 1, 2)
    weight_last = w.permute(0, 2, 3, 1).reshape(w.shape)
    return {
        "the bias is not added": lambda: F.conv2d(x, w, None, S, P),
        "the kernel is turned by 180°: in deep learning it is not": (
            lambda: F.conv2d(x, w.flip(2, 3), b, S, P)
        ),
        "rows and columns of the kernel are swapped": (
            lambda: F.conv2d(x, w.transpose(2, 3), b, S, P)
        ),
        "the columns are in the order (K, K, C_i), the weight is flattened as (C_i, K, K)": (
            lambda: F.conv2d(x, columns_last, b, S, P)
        ),
        "the weight is flattened as (K, K, C_i), the columns are in the order (C_i, K, K)": (
            lambda: F.conv2d(x, weight_last, b, S, P)
        ),
        "channels and positions are mixed: transpose (N, L, C_o) to (N, C_o, L) before reshaping": (
            lambda: right.permute(0, 2, 3, 1).reshape(right.shape)
        ),
        "height and width of the output are swapped": lambda: right.mT,
        "the output is read row by row, but its positions run down the columns": (
            lambda: right.mT.reshape(right.shape)
        ),
        "the output is read column by column, but its positions run along the rows": (
            lambda: right.reshape(right.mT.shape).mT
        ),
        "the padding is ignored": lambda: F.conv2d(x, w, b, S, 0),
        "the bias is added more than once": lambda: right + b[:, None, None],
        "the bias is added more than once: at each position of the kernel": (
            lambda: right + (K * K - 1) * b[:, None, None]
        ),
        "the stride is ignored": lambda: F.conv2d(x, w, b, 1, P),
    }


# ---- Without a bias --------------------------------------------------------------------------


def samples_without_bias(seed: int) -> list[Sample]:
    """bias=None, as CustomConv2d(bias=False) passes it."""
    return [sample(case, seed) for case in WITHOUT_BIAS]


def probe_without_bias(code: ModuleType, inputs: Sequence[Sample]) -> Findings:
    """Output and gradients with bias=None; the parameters of CustomConv2d(bias=False)."""

    def parameters() -> list[str]:
        layer = find(code, "CustomConv2d")(4, 3, kernel_size=3, bias=False)
        return sorted(name for name, _ in layer.named_parameters())

    runs = [attempt(forward_backward, code, one) for one in inputs]
    return {"cases": runs, "parameters": attempt(parameters)}


def forward_backward(code: ModuleType, one: Sample) -> dict[str, Any]:
    """The output, and the gradients of those of x, w and b that are there."""
    leaves = one.leaves()
    tensors = [t for t in leaves if t is not None]
    y = forward(code, one.case, *leaves)
    expect(y.shape == one.g.shape, f"the output ({one.case}) has shape {tuple(y.shape)}")
    expect(y.dtype == one.g.dtype, f"the output of {one.g.dtype} tensors is {y.dtype}", DTYPE)
    with Refuse():
        return {"y": y, "grads": torch.autograd.grad(y, tensors, one.g)}


def judge_without_bias(inputs: Sequence[Sample], findings: Findings) -> None:
    """Against torch's; what is raised is about the bias."""
    try:
        for one, finding in zip(inputs, findings["cases"], strict=True):
            judge_both(one, value(finding, f"with bias=None ({one.case})"), str(one.case))
        names = value(findings["parameters"], "CustomConv2d(bias=False)")
    except CheckFailed as e:
        raise CheckFailed(str(e), e.hint or NO_BIAS) from None
    problem = f"CustomConv2d(bias=False) has parameters {names}, expected only the weight"
    expect(names == ["weight"], problem, NO_BIAS)


def judge_both(one: Sample, finding: Mapping, which: str, tol: float = TOL) -> None:
    """Output and gradients of a case against torch's."""
    right = one.output()
    compare(f"the output ({which})", finding["y"], right, forward_mistakes(one, right), tol=tol)
    for i, found in enumerate(finding["grads"]):
        compare(f"the gradient of {NAMES[i]} ({which})", found, one.gradient(i), tol=tol)


# ---- Memory layouts --------------------------------------------------------------------------

LAYOUTS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "columns in memory": lambda t: t.mT.contiguous().mT,
}
LAID_OUT = {"x": "input_feats", "w": "weight", "g": "grad_output"}


def layouts(seed: int) -> list[tuple[str, str, Sample]]:
    """One tensor at a time in another memory layout, in two dtypes: (tensor, layout, sample)."""
    return [
        (name, layout, one._replace(**{name: change(getattr(one, name))}))
        for dtype in (torch.double, torch.float)
        for one in [sample(Case(3, 2, 1), seed, dtype)]
        for layout, change in LAYOUTS.items()
        for name in LAID_OUT
    ]


def probe_layouts(code: ModuleType, inputs: Sequence[tuple[str, str, Sample]]) -> Findings:
    """Output and gradients of each."""
    return {"cases": [attempt(forward_backward, code, one) for _, _, one in inputs]}


def judge_layouts(inputs: Sequence[tuple[str, str, Sample]], findings: Findings) -> list[str]:
    """A layout of x or w at which it raises is a remark: the course makes none such."""
    remarks = {}
    for (name, layout, one), finding in zip(inputs, findings["cases"], strict=True):
        dtype = str(one.x.dtype).removeprefix("torch.")
        which = f"{LAID_OUT[name]}: {layout}, {dtype}"
        try:
            judge_both(one, value(finding, which), which, 1e-5 if dtype == "float32" else TOL)
        except CheckFailed as e:
            if name == "g" or "raises" not in str(e):
                raise
            remarks[name] = f"{e} ({e.hint or 'the course makes no such tensor'})"
    return list(remarks.values())


# ---- Gradients -------------------------------------------------------------------------------


def probe_gradient(which: int) -> Callable[[ModuleType, Sequence[Sample]], Findings]:
    """The probe for the gradient of x, w or b (0, 1, 2)."""

    def probe(code: ModuleType, inputs: Sequence[Sample]) -> Findings:
        cases = [attempt(backward, code, one, which) for one in inputs]
        return {"cases": cases, "alone": attempt(backward, code, inputs[0], which, alone=True)}

    return probe


def backward(code: ModuleType, one: Sample, which: int, alone: bool = False) -> Tensor | None:
    """The gradient that autograd gives; `alone`: no other tensor requires one."""
    tensors = one.leaves()
    if alone:
        tensors = [t if i == which else t.detach() for i, t in enumerate(tensors)]
    found = forward(code, one.case, *tensors)
    hint = "see the check of the forward pass"
    expect(found.shape == one.g.shape, f"the output ({one.case}) has a wrong shape", hint)
    with Refuse():
        return torch.autograd.grad(found, tensors[which], one.g, allow_unused=True)[0]


def judge_gradient(which: int) -> Callable[[Sequence[Sample], Findings], None]:
    """The judge for the gradient of x, w or b: against torch's."""

    def judge_one(one: Sample, finding: object) -> None:
        what, expected = f"the gradient of {NAMES[which]} ({one.case})", one.gradient(which)
        found = shaped(one, finding, what)
        hint = "" if found is not None else "backward returns None in its place"
        mistakes = MISTAKES[which](one, expected)
        compare(what, found, expected, mistakes, hint=hint, tol=TOL)

    def judge(inputs: Sequence[Sample], findings: Findings) -> None:
        judge_each(inputs, findings, judge_one)
        what = f"the gradient of {NAMES[which]}, where no other tensor wants one"
        compare(what, value(findings["alone"], what), inputs[0].gradient(which), tol=TOL)

    return judge


def shaped(one: Sample, finding: object, what: str) -> object:
    """The finding; for a gradient of a wrong shape, which autograd refuses, a hint."""
    try:
        return value(finding, what)
    except CheckFailed as e:
        invalid = INVALID.search(str(e))
        if not invalid:
            raise
    at, case = int(invalid[1]), one.case
    shapes = [tuple(map(int, re.findall(r"\d+", text))) for text in invalid.groups()[1:]]
    padded = (case.N, case.C_i, case.H + 2 * case.P, case.W + 2 * case.P)
    hints = {
        (0, padded): "padding not removed: cut `padding` rows and columns from each side",
        (1, (case.C_i, case.C_o, case.K, case.K)): "channels in and out are swapped",
        (2, tuple(one.g.shape[1:])): "the sum over positions is missing",
        (0, (case.N, case.C_i, 0, 0)): "[p:-p] is empty for padding 0: cut p:p+H and p:p+W",
    }
    raise CheckFailed(
        f"the gradient of {NAMES[at]} ({case}) has shape {shapes[0]}, expected {shapes[1]}",
        hints.get((at, shapes[0]), ""),
    )


def input_mistakes(one: Sample, expected: Tensor) -> Mistakes:
    """What each would make of dl/dx."""
    case, x, w, _, g = one
    S, P, (H, W) = case.S, case.P, x.shape[2:]
    padded = (H + 2 * P, W + 2 * P)
    columns = w.flatten(1).t() @ g.flatten(2)  # (N, C_i K K, L)

    def turned() -> Tensor:
        flipped = w.flip(2, 3).flatten(1).t() @ g.flatten(2)
        return F.fold(flipped, (H, W), case.K, padding=P, stride=S)

    def overwritten() -> Tensor:
        dx = x.new_zeros(case.N, case.C_i, *padded)
        patches = columns.view(case.N, case.C_i, case.K, case.K, *g.shape[2:])
        for i, j in product(*map(range, g.shape[2:])):
            dx[..., i * S : i * S + case.K, j * S : j * S + case.K] = patches[..., i, j]
        return dx[..., P : P + H, P : P + W]

    def unstrided() -> Tensor:
        dx, covered = x.new_zeros(case.N, case.C_i, *padded), [n + case.K - 1 for n in g.shape[2:]]
        dx[..., : covered[0], : covered[1]] = F.fold(columns, covered, case.K)
        return dx[..., P : P + H, P : P + W]

    def averaged() -> Tensor:
        times = F.fold(torch.ones_like(columns), (H, W), case.K, padding=P, stride=S)
        return expected / times.clamp(min=1)

    return {
        "padding not removed: cut `padding` rows and columns from each side, not 2 × from one": (
            lambda: F.fold(columns, padded, case.K, stride=S)[..., :H, :W]
        ),
        "the kernel is turned by 180° once too often, or once too seldom": turned,
        "where windows overlap the last one wins: add them up (col2im, F.fold)": overwritten,
        "where windows overlap they are averaged: add them up": averaged,
        NO_STRIDE: unstrided,
        "it is the mean over the batch's size": lambda: expected / case.N,
        "it is counted twice": lambda: 2 * expected,
        "it is zero": lambda: torch.zeros_like(expected),
    }


def weight_mistakes(one: Sample, expected: Tensor) -> Mistakes:
    """What each would make of dl/dw."""

    def of_images(chosen: slice) -> Tensor:
        return one._replace(x=one.x[chosen], g=one.g[chosen]).gradient(1)

    def unstrided() -> Tensor:
        K, P, (H_o, W_o) = one.case.K, one.case.P, one.g.shape[2:]
        windows = F.pad(one.x, (P,) * 4).unfold(2, K, 1).unfold(3, K, 1)[:, :, :H_o, :W_o]
        return torch.einsum("nohw,nchwuv->ocuv", one.g, windows)

    missing = "the sum over the batch is missing: this is the gradient of the {} image alone"
    return {
        missing.format("last"): lambda: of_images(slice(-1, None)),
        missing.format("first"): lambda: of_images(slice(0, 1)),
        "it is a mean over the batch: the gradient is the sum": lambda: expected / one.case.N,
        "it is a mean over positions: the gradient is the sum": (
            lambda: expected / one.g.shape[2:].numel()
        ),
        "it is counted twice": lambda: 2 * expected,
        NO_STRIDE: unstrided,
        "the kernel's gradient is turned by 180°": lambda: expected.flip(2, 3),
        "rows and columns of the kernel are swapped": lambda: expected.transpose(2, 3),
        "columns are (C_i, K, K) in unfold: the gradient is reshaped in another order": (
            lambda: expected.permute(0, 2, 3, 1).reshape(expected.shape)
        ),
        "it is zero": lambda: torch.zeros_like(expected),
    }


def bias_mistakes(one: Sample, expected: Tensor) -> Mistakes:
    """What each would make of dl/db."""
    g = one.g
    missing = "the sum over the batch is missing: this is the gradient of the {} image alone"
    return {
        missing.format("last"): lambda: g[-1].sum((1, 2)),
        missing.format("first"): lambda: g[0].sum((1, 2)),
        "it is a mean over the batch: the gradient is the sum": lambda: expected / len(g),
        "it is a mean over batch and positions: sum them": lambda: g.mean((0, 2, 3)),
        "it is a mean over positions: sum them": lambda: g.mean((2, 3)).sum(0),
        "it is counted twice": lambda: 2 * expected,
        "it is summed over the channels too": lambda: g.sum().expand_as(expected),
        "it is zero": lambda: torch.zeros_like(expected),
    }


MISTAKES = (input_mistakes, weight_mistakes, bias_mistakes)


# ---- Module ----------------------------------------------------------------------------------


def module_sample(seed: int) -> Sample:
    """Weights for a CustomConv2d, and images."""
    return sample(Case(3, 2, 1), seed, torch.float)


def probe_module(code: ModuleType, one: Sample) -> Findings:
    """A CustomConv2d: its parameters as they are made, then its output and a step's gradients."""
    case = one.case
    layer = find(code, "CustomConv2d")(
        case.C_i, case.C_o, kernel_size=case.K, stride=case.S, padding=case.P
    )
    shapes = {name: list(p.shape) for name, p in layer.named_parameters()}
    weight = layer.weight.detach().clone()

    def step() -> dict[str, Any]:
        layer.load_state_dict({"weight": one.w, "bias": one.b})
        with Refuse():
            y = layer(one.x)
            y.square().sum().backward()
        return {"y": y, "grads": {name: p.grad for name, p in layer.named_parameters()}}

    def rectified() -> Tensor:
        y = F.relu_(layer(one.x))
        y.sum().backward()
        return y

    found = {"shapes": shapes, "weight": weight, "step": attempt(step)}
    return found | {"rectified": attempt(rectified)}


def judge_module(one: Sample, findings: Findings) -> None:
    """With the weights of an nn.Conv2d: the same output and the same step, so the same training."""
    found = findings["shapes"]
    expected = {"weight": list(one.w.shape), "bias": list(one.b.shape)}
    expect(found == expected, f"CustomConv2d has parameters {found}, expected {expected}")
    spread = findings["weight"].double().std().item()
    problem = f"CustomConv2d.weight has standard deviation {spread:g}"
    expect(0 < spread < float("inf"), problem, "initialise it")
    step, right = value(findings["step"], "CustomConv2d"), one.output()
    mistakes = forward_mistakes(one, right)
    compare(f"the output of CustomConv2d ({one.case})", step["y"], right, mistakes, tol=1e-4)
    twice = one._replace(g=2 * right)  # of the sum of squares
    for i, name in ((1, "weight"), (2, "bias")):
        what = f"CustomConv2d.{name}.grad ({one.case})"
        compare(what, step["grads"].get(name), twice.gradient(i), tol=1e-4)
    what = "nn.ReLU(inplace=True) on the output of CustomConv2d"
    compare(what, value(findings["rectified"], what), right.relu(), tol=1e-4)


# ---- Network ---------------------------------------------------------------------------------

CLASSES = 7


def network_images(seed: int) -> Tensor:
    """Two images (2, 3, 128, 128)."""
    return torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(seed))


def probe_network(code: ModuleType, x: Tensor) -> Findings:
    """default_cnn_model on CustomConv2d and on nn.Conv2d; in float32 if double fails."""
    double = attempt(both_networks, code, x.double())
    return {"double": double, "float": attempt(both_networks, code, x) if "error" in double else {}}


def both_networks(code: ModuleType, x: Tensor) -> Findings:
    """Logits and gradients on both kinds of convolution with the same weights."""
    build, layer = find(code, "default_cnn_model"), find(code, "CustomConv2d")
    custom, plain = (
        build(conv_op=op, num_classes=CLASSES).eval().to(x.dtype) for op in (layer, nn.Conv2d)
    )
    custom.load_state_dict(plain.state_dict())
    replaced = [m for m in custom.modules() if isinstance(m, layer)]
    kept = [m for m in custom.modules() if isinstance(m, nn.Conv2d) and not isinstance(m, layer)]
    with Watch() as watch:
        logits = [custom(x.clone())]
    logits.append(plain(x.clone()))
    for y in logits:
        F.cross_entropy(y, torch.tensor([0, 3])).backward()
    return {
        "replaced": len(replaced),
        "kept": sum(map(replaceable, kept)),
        "used": sum(any(p.grad is not None for p in m.parameters()) for m in replaced),
        "torchs": watch.forbidden if not kept else "",
        "logits": logits,
        "grads": [{n: p.grad for n, p in net.named_parameters()} for net in (custom, plain)],
    }


def replaceable(layer: nn.Conv2d) -> bool:
    """Whether CustomConv2d can do it: square kernels, one stride, one padding, no groups."""
    sizes = (layer.kernel_size, layer.stride, layer.padding)
    equal = all(isinstance(size, str) or len(set(size)) == 1 for size in sizes)
    return equal and layer.groups == 1 and set(layer.dilation) == {1}


def judge_network(x: Tensor, findings: Findings) -> None:
    """All convolutions that CustomConv2d can do are made by it; logits and gradients are equal.

    In double precision: in float32, rounding flips ReLUs and max-pools, and the gradients of a
    right answer differ by 1 %.
    """
    alone = "error" in findings["double"]
    found, tol = value(findings["float" if alone else "double"]), 0.05 if alone else TOL
    replaced, kept, torchs = (found[name] for name in ("replaced", "kept", "torchs"))
    expect(replaced > 0, "default_cnn_model(conv_op=CustomConv2d) holds no CustomConv2d")
    problem = f"with conv_op=CustomConv2d, {kept} of {replaced + kept} convolutions are nn.Conv2d"
    expect(kept == 0, problem, "make every convolution with conv_op")
    expect(not torchs, f"with conv_op=CustomConv2d, forward calls {torchs}")
    expect(found["used"] > 0, "no CustomConv2d takes part in forward")
    logits, expected = found["logits"]
    shape = tuple(expected.shape)
    expect(shape == (len(x), CLASSES), f"the logits have shape {shape}, not {(len(x), CLASSES)}")
    expect(bool(expected.std() > 0), "the logits are all the same number")
    compare("the logits on CustomConv2d", logits, expected, tol=tol)
    grads, right = found["grads"]
    for name, expected in right.items():
        if expected is not None:
            compare(f"the gradient of {name} on CustomConv2d", grads[name], expected, tol=tol)


PART_I = "handout, part I: implement the forward and backward pass of a 2-D convolution"

CHECKS = (
    Check(
        "conv",
        0.5,
        "forward: kernels, strides, paddings, bias",
        probe_forward,
        judge_forward,
        "custom_conv2d of small images in float64, against torch's convolution; kernels 1 to 7, "
        f"strides 1 to 3, paddings 0 to 4, no convolution of torch's inside ({PART_I})",
        samples,
    ),
    Check(
        "conv",
        0.125,
        "without a bias: forward and backward",
        probe_without_bias,
        judge_without_bias,
        "custom_conv2d with bias=None, which CustomConv2d(bias=False) passes: output and gradients "
        f"against torch's ({PART_I}; the skeleton's bias may be None)",
        samples_without_bias,
    ),
    Check(
        "conv",
        0.125,
        "memory layouts and dtypes",
        probe_layouts,
        judge_layouts,
        "input, weight or incoming gradient in another memory layout, in float32 and float64; a "
        f"layout of input or weight that raises is a remark ({PART_I})",
        layouts,
    ),
    *(
        Check(
            "conv",
            points,
            f"gradient of the {name}",
            probe_gradient(which),
            judge_gradient(which),
            f"what autograd gives for the {name} of custom_conv2d, from a random incoming "
            f"gradient, against torch's, in the cases of the forward check ({PART_I})",
            samples,
        )
        for which, (name, points) in enumerate(
            (("input", 0.375), ("weight", 0.375), ("bias", 0.125))
        )
    ),
    Check(
        "conv",
        0.25,
        "CustomConv2d trains like nn.Conv2d",
        probe_module,
        judge_module,
        "parameters, their initialisation, output and gradients of the module against nn.Conv2d's, "
        "and an in-place ReLU after it, as in SimpleNet (handout, part I: train with "
        "--use-custom-conv)",
        module_sample,
    ),
    Check(
        "conv",
        0.125,
        "the CNN runs on CustomConv2d",
        probe_network,
        judge_network,
        "default_cnn_model(conv_op=CustomConv2d) against the same network on nn.Conv2d: which "
        "layers it holds, logits and all gradients, in float64 (handout, part I: train with "
        "--use-custom-conv)",
        network_images,
    ),
)
