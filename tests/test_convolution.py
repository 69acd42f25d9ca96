"""Our convolution against torch's, against numeric derivatives, and against its promises."""

import copy
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import student_code
from student_code import CustomConv2d, SimpleNet, custom_conv2d

CODE = Path(__file__).parent.parent / "code"
# (C_i, C_o, K, S, P): each way through the code, strides beyond the kernel, padding beyond it
LAYERS = [(3, 4, 3, 1, 1), (3, 4, 3, 2, 0), (4, 2, 1, 1, 0), (2, 3, 1, 2, 1), (1, 6, 3, 1, 0)]
LAYERS += [(2, 2, 2, 3, 2), (2, 3, 2, 1, 3), (3, 2, 5, 2, 2)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))]  # fmt: skip


def tensors(N, C_i, C_o, K, H=7, W=6, dtype=torch.double, device="cpu"):
    """x, w, b and a seed that gives the same for the same sizes."""
    generator = torch.Generator().manual_seed(N + C_i + C_o + K + H + W)
    shapes = ((N, C_i, H, W), (C_o, C_i, K, K), (C_o,))
    made = (torch.randn(s, dtype=dtype, generator=generator) for s in shapes)
    return [t.to(device).requires_grad_() for t in made]


def outcome(convolve, x, w, b, stride, padding):
    """The output, and the gradients of those of x, w and b that want one."""
    y = convolve(x, w, b, stride, padding)
    G = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    wanting = [t for t in (x, w, b) if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, wanting, G)]


def relative_error(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


# ---- Against torch ---------------------------------------------------------------------------


def lay_out(x, layout):
    """The same numbers, otherwise in memory."""
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "every other":
        return x.repeat_interleave(2, 3)[..., ::2]
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_agrees_with_torch_on_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    N, C_i, C_o, K, S, P = (draw(*r) for r in ((0, 5), (1, 5), (1, 5), (1, 5), (1, 4), (0, 4)))
    H, W = (draw(max(1, K - 2 * P), 9) for _ in "HW")
    x, w, b = (t.detach() for t in tensors(N, C_i, C_o, K, H, W))
    layouts = st.sampled_from(["", "channels_last", "transposed", "every other", "expanded"])
    x = lay_out(x, data.draw(layouts)).requires_grad_()
    w = lay_out(w, data.draw(st.sampled_from(["", "channels_last"]))).requires_grad_()
    b = b.requires_grad_() if data.draw(st.booleans()) else None
    with pytest.MonkeyPatch.context() as patch:
        images = data.draw(st.sampled_from([1, 2, 100]))  # chunks, the last one not always full
        patch.setattr(student_code, "_at_once", lambda *_: images)
        ours = outcome(custom_conv2d, x, w, b, S, P)
    for a, e in zip(ours, outcome(F.conv2d, x, w, b, S, P), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "layer", [(3, 64, 7, 2, 3, 64), (64, 64, 3, 1, 1, 32), (64, 256, 1, 1, 0, 32)]
)
def test_float32_is_as_exact_as_torchs(layer, device):
    C_i, C_o, K, S, P, size = layer
    single = tensors(8, C_i, C_o, K, size, size, torch.float32, device)
    double = [t.detach().double().requires_grad_() for t in single]
    exact = outcome(F.conv2d, *double, S, P)
    ours, torchs = (
        max(map(relative_error, outcome(f, *single, S, P), exact))
        for f in (custom_conv2d, F.conv2d)
    )
    assert ours <= torchs


def test_simplenet_trains_the_same_with_either_convolution():
    """Float64: each gradient within 1e-10, the weights after 20 steps within 1e-8."""
    torch.manual_seed(0)
    images, labels = torch.randn(20, 4, 3, 64, 64).double(), torch.randint(10, (20, 4))
    torchs = SimpleNet(nn.Conv2d, num_classes=10).double()
    train(torchs, images[:5], labels[:5])  # partly trained
    ours = SimpleNet(CustomConv2d, num_classes=10).double()
    ours.load_state_dict(torchs.state_dict())
    for network in (ours, torchs):
        network.zero_grad()
        F.cross_entropy(network(images[0]), labels[0]).backward()
    for (name, a), e in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        assert (a.grad - e.grad).abs().max() < 1e-10, name
    start = copy.deepcopy(torchs.state_dict())
    for network in (ours, torchs):
        train(network, images, labels)
    for (name, a), e in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        assert (a - e).abs().max() < 1e-8, name
        assert (start[name] - e).abs().max() > 1e-6, f"{name} was not trained"


def train(network, batches, labels):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for x, target in zip(batches, labels, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(network(x), target).backward()
        optimizer.step()


# ---- Derivatives -----------------------------------------------------------------------------


@pytest.mark.parametrize("C_i, C_o, K, S, P", LAYERS)
def test_first_and_second_derivatives_are_right(C_i, C_o, K, S, P):
    inputs = tensors(2, C_i, C_o, K, H=4, W=3)
    assert gradcheck(custom_conv2d, (*inputs, S, P))
    assert gradgradcheck(custom_conv2d, (*inputs, S, P), fast_mode=True)


def test_third_derivative():
    """(w x)³ of a 1x1 kernel on one pixel: its third derivative along x is 6 w³."""
    x, w, _ = tensors(1, 1, 1, 1, H=1, W=1)
    d = custom_conv2d(x, w, None) ** 3
    for _ in range(3):
        (d,) = torch.autograd.grad(d.sum(), x, create_graph=True)
    assert d.item() == pytest.approx(6 * w.item() ** 3)


@pytest.mark.parametrize("wanting", ["x", "w", "b"])
def test_only_gradients_that_are_wanted_are_computed(monkeypatch, wanting):
    def refuse(*_):
        raise AssertionError("an unwanted gradient")

    inputs = dict(zip("xwb", tensors(2, 3, 4, 3), strict=True))
    for name, t in inputs.items():
        t.requires_grad_(name == wanting)
    if wanting != "x":
        monkeypatch.setattr(student_code, "_input_gradient", refuse)
    if wanting != "w":
        monkeypatch.setattr(student_code, "_weight_gradient", refuse)
    ours = outcome(custom_conv2d, *inputs.values(), 1, 1)[1]
    torch.testing.assert_close(ours, outcome(F.conv2d, *inputs.values(), 1, 1)[1])


# ---- Promises --------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """The names of all operations that run, those inside autograd's backward too."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket._qualified_op_name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("C_i, C_o, K, S, P", LAYERS)
def test_no_convolution_function_is_reached(C_i, C_o, K, S, P):
    inputs = tensors(2, C_i, C_o, K)
    with Seen() as seen:
        y = custom_conv2d(*inputs, S, P)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    assert seen.names & {"aten::bmm", "aten::mm"}
    assert not [name for name in seen.names if "conv" in name]
    with Seen() as seen:
        F.conv2d(*inputs, stride=S, padding=P)
    assert [name for name in seen.names if "conv" in name], "the watch itself sees nothing"


@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("w_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("K, S, P", [(3, 1, 1), (1, 1, 0), (3, 2, 1)])
def test_memory_formats_are_those_of_torch(x_format, w_format, K, S, P):
    x, w, b = tensors(4, 8, 6, K, dtype=torch.float32)
    x = x.detach().to(memory_format=x_format).requires_grad_()
    w = w.detach().to(memory_format=w_format).requires_grad_()
    (y, dx, *_), (right, right_dx, *_) = (
        outcome(f, x, w, b, S, P) for f in (custom_conv2d, F.conv2d)
    )
    assert y.stride() == right.stride() and dx.stride() == right_dx.stride()


def saved_bytes(network, x):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        network(x)
    return sum(sizes)


def test_saves_no_more_for_backward_than_torch():
    x = torch.randn(2, 3, 64, 64)
    assert saved_bytes(SimpleNet(CustomConv2d), x) <= saved_bytes(SimpleNet(nn.Conv2d), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C_i, C_o, K, S, P", LAYERS[:3])
def test_autocast(C_i, C_o, K, S, P, dtype, device):
    inputs = tensors(8, C_i, C_o, K, 16, 16, torch.float32, device)
    with torch.autocast(device, dtype):
        (y, *ours), (right, *torchs) = (
            outcome(f, *inputs, S, P) for f in (custom_conv2d, F.conv2d)
        )
    assert y.dtype == right.dtype == dtype
    assert relative_error(y, right) < 0.02
    for a, e, t in zip(ours, torchs, inputs, strict=True):
        assert a.dtype == t.dtype == torch.float32
        assert relative_error(a, e) < 0.02


def test_autocast_leaves_double_alone_and_reaches_second_derivatives():
    inputs = tensors(2, 3, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert custom_conv2d(*inputs).dtype == torch.double
        x, w, _ = tensors(2, 3, 4, 3, dtype=torch.float32)
        (dx,) = torch.autograd.grad(custom_conv2d(x, w, None).sum(), x, create_graph=True)
        (dw,) = torch.autograd.grad(dx.square().sum(), w)
        (dx,) = torch.autograd.grad(F.conv2d(x, w, None).sum(), x, create_graph=True)
        (right,) = torch.autograd.grad(dx.square().sum(), w)
    assert relative_error(dw, right) < 0.02


def test_backward_under_autocast_keeps_a_float32_forward_exact():
    inputs = tensors(2, 3, 4, 3, dtype=torch.float32)
    y = custom_conv2d(*inputs)
    right = torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        under = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert all(torch.equal(a, e) for a, e in zip(under, right, strict=True))


def test_an_inplace_relu_may_follow():
    inputs = tensors(2, 3, 4, 3)
    ours, torchs = (
        torch.autograd.grad(F.relu(f(*inputs), inplace=True).square().sum(), inputs)
        for f in (custom_conv2d, F.conv2d)
    )
    for a, e in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.filterwarnings("ignore")  # the compiler's own deprecations
def test_torch_compile_gives_the_same():
    torch._dynamo.reset()
    network = nn.Sequential(CustomConv2d(3, 4, 3), nn.ReLU(), CustomConv2d(4, 2, 1)).double()
    x = torch.randn(3, 3, 6, 6).double()
    expected = outcome(lambda x, *_: network(x), x.requires_grad_(), None, None, 1, 0)
    compiled = torch.compile(network, backend="aot_eager")
    for a, e in zip(outcome(lambda x, *_: compiled(x), x, None, None, 1, 0), expected, strict=True):
        torch.testing.assert_close(a, e)


# ---- The module and what is refused ----------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_module_starts_as_nn_conv2d_does_and_shares_its_files(bias):
    made = []
    for kind in (nn.Conv2d, CustomConv2d):
        torch.manual_seed(3)
        made.append(kind(5, 7, (3, 3), stride=[2, 2], padding=1, bias=bias))
    torchs, ours = made
    for name, value in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 5, 8, 9)
    torch.testing.assert_close(ours(x), torchs(x))


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"groups": 2}, "groups"),
        ({"dilation": 2}, "dilation"),
        ({"dilation": (1, 2)}, "dilation"),
        ({"kernel_size": (3, 5)}, "kernel_size"),
        ({"stride": (1, 2)}, "stride"),
        ({"padding": (0, 1)}, "padding"),
        ({"padding": "same"}, "padding"),
    ],
)
def test_the_module_refuses_what_it_would_have_to_ignore(wrong, word):
    with pytest.raises(ValueError, match=word):
        CustomConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **wrong})


X, W, B = torch.zeros(2, 3, 5, 4), torch.zeros(6, 3, 3, 3), torch.zeros(6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((X[0], W, B), r"expected an input \(N, C_i, H, W\)"),
        ((X, W[:, :, :2], B), "square"),
        ((X[:, :2], W, B), "3 input channels"),
        ((X, W, B[:5]), "bias of 6"),
        ((X, W.double(), B), "weight .*float64.*differ"),
        ((X, W, B.double()), "bias .*float64.*differ"),
        ((X, W.to("meta"), B), "weight .*meta.*differ"),
        ((X, W, B, 0), "stride 0"),
        ((X, W, B, 1, -1), "padding -1"),
        ((X, W, B, (1, 1)), "integers"),
        ((X[..., :2], W, B), r"larger than the padded input \(5 x 2\)"),
    ],
)
def test_the_function_refuses_what_torch_refuses(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        custom_conv2d(*arguments)


# ---- The autograder's script -----------------------------------------------------------------

ANSWER = """
import torch
import torch.nn as nn
import torch.nn.functional as F


class CustomConv2DFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, stride=1, padding=0):
        ctx.save_for_backward(x, w)
        ctx.stride, ctx.padding = stride, padding
        if b is None:
            b = w.new_zeros(len(w))
        y = w.flatten(1) @ F.unfold(x, w.shape[2], padding=padding, stride=stride)
        return (y + b[:, None]).view(len(x), len(w), (x.shape[2] + 2 * padding - w.shape[2]) // stride + 1, -1).clone()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        columns = F.unfold(x, w.shape[2], padding=ctx.padding, stride=ctx.stride)
        g = g.flatten(2)
        dx = F.fold(w.flatten(1).t() @ g, x.shape[2:], w.shape[2], padding=ctx.padding, stride=ctx.stride)
        dw = torch.einsum("nol,nkl->ok", g, columns).view_as(w)
        db = g.sum((0, 2)) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None


custom_conv2d = CustomConv2DFunction.apply


class CustomConv2d(nn.Module):
    def __init__(self, c_in, c_out, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True):
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(torch.rand(c_out, c_in, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x):
        return custom_conv2d(x, self.weight, self.bias, self.stride, self.padding)
"""  # noqa: E501


def test_the_script_passes_ours():
    command = [sys.executable, "test_conv.py"]
    done = subprocess.run(command, cwd=CODE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("All passed! End of testing.\n")
    assert done.stdout.count("forward pass: passed") == 8


@pytest.mark.parametrize(
    "right, wrong, named",
    [
        ("", "", None),
        ("(y + b[:, None])", "y", "the output is wrong"),
        ("g.sum((0, 2))", "g[0].sum(1)", "gradient of bias is wrong at 8 places"),
        ("g.sum((0, 2))", "g.mean((0, 2))", "gradient of bias"),
        ("return dx,", "return dx.flip(2),", "gradient of input_feats"),
        ("dw = torch.einsum(", "dw = 2 * torch.einsum(", "gradient of weight"),
        ("return dx, dw, db", "return dx, None, db", "gradient of weight is None"),
        ("return (y +", "return (y.float().double() +", "the output is wrong"),
        ("self.weight, self.bias, self.stride, self.padding", "self.weight, self.bias, 1, 1",
         "the output of CustomConv2d"),
        ("self.weight = nn.Parameter", "self.kernel = self.weight = nn.Parameter", "parameters"),
        ("torch.zeros(c_out))", "torch.full((c_out,), torch.nan))", "not initialised"),
    ],
)  # fmt: skip
def test_the_script_fails_wrong_answers_and_says_where(monkeypatch, capsys, right, wrong, named):
    answer = types.ModuleType("student_code")
    assert right in ANSWER
    exec(ANSWER.replace(right, wrong), answer.__dict__)
    monkeypatch.setitem(sys.modules, "student_code", answer)
    script = runpy.run_path(CODE / "test_conv.py")
    if right == wrong:
        script["main"]()
        assert capsys.readouterr().out.endswith("All passed! End of testing.\n")
        return
    with pytest.raises(SystemExit) as end:
        script["main"]()
    assert end.value.code == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("FAILED: ") and named in last


def test_the_scripts_status_tells_of_a_crash(tmp_path):
    shutil.copy(CODE / "test_conv.py", tmp_path)
    (tmp_path / "student_code.py").write_text(ANSWER.replace("w.flatten(1) @", "w @"))
    command = [sys.executable, "test_conv.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "All passed" not in done.stdout


@pytest.mark.parametrize(
    ("N", "columns", "step"),
    [
        (256, 4096 * 147 * 2, 256),  # SimpleNet's first layer, bfloat16: one product
        (256, 4096 * 147 * 4, 128),  # float32: two of one size
        (10, 2**28, 2),
        (3, 2**30, 1),  # one image at least
        (0, 2**20, 1),
        (5, 0, 5),
    ],
)
def test_a_gpu_gets_few_parts_of_one_size(N, columns, step):
    assert student_code._at_once(N, columns, torch.device("cuda")) == step
