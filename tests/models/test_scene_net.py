"""SceneNet and its recipe: layers against arithmetic, ingredients against their laws, a run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_network import narrow_scene_net
from torch import nn

import main
from deepvision import checkpoint
from deepvision.config import RECIPES, SCENE_NET, parse, resolve_defaults
from deepvision.models import registry
from deepvision.models.scene_net import SHAPES, Block, SceneNet, Shape
from deepvision.reporting import records
from deepvision.runtime.device import DeviceContext, prepare_model
from deepvision.runtime.jsonl import read_metrics
from deepvision.runtime.meters import EpochMetrics, StepTimer
from deepvision.training import engine, optim
from deepvision.training.objectives import CutMix, Standard

CODE = Path(main.__file__).parent
CPU_RECIPE = RECIPES["cpu"]
CPU = DeviceContext(torch.device("cpu"))


def parsed(*words: str):
    """The settings of a run with its network's defaults."""
    config = parse(["data", "--gpu=-1", *words])
    return resolve_defaults(config, config.network or "torch_conv")


def random_norms(net: nn.Module) -> nn.Module:
    """No normalisation is the identity any more, no branch zero."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(values)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


# ---- The network


@pytest.mark.parametrize("shape", [Shape(), *SHAPES.values()], ids=["first", *SHAPES])
def test_it_has_fewer_than_12_million_parameters_and_uses_each(shape):
    net = random_norms(SceneNet(100, shape))
    assert sum(p.numel() for p in net.parameters()) <= 12e6
    logits = net(torch.randn(2, 3, 128, 128))
    assert logits.shape == (2, 100)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def scene_net_by_hand(p: dict[str, torch.Tensor], x: torch.Tensor, layers: str):
    """layers: c, s, k convolutions (3 x 3 / 2, 3 x 3, 1 x 1), r ReLU, p, q pooling, b a block."""

    def conv(x, name, norm, stride=1):
        w = p[f"{name}.weight"]
        x = F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)
        m, v, g, b = (
            p[f"{norm}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - m) / (v + 1e-5).sqrt() * g + b

    def block(x, name):
        y = conv(x, f"{name}.branch.0", f"{name}.branch.1").relu()
        y = conv(y, f"{name}.branch.3", f"{name}.branch.4")
        z = y.mean((2, 3))
        for layer, act in (("squeeze", torch.relu), ("excite", torch.sigmoid)):
            layer = f"{name}.excitation.{layer}"
            if f"{layer}.weight" in p:
                z = act(z @ p[f"{layer}.weight"].T + p[f"{layer}.bias"])
            else:
                z = torch.ones_like(z)
        if x.shape[1] != y.shape[1]:
            x = conv(x, f"{name}.shortcut.0", f"{name}.shortcut.1")
        return (x + y * z[:, :, None, None]).relu()

    for i, layer in enumerate(layers):
        if layer in "csk":
            stride = 2 if layer == "c" else 1
            x = conv(x, f"features.{i}", f"features.{i + 1}", stride)
        elif layer != "n":  # n: the normalisation, done with its convolution
            x = {
                "r": torch.relu,
                "p": lambda x: F.max_pool2d(x, 3, 2, 1),
                "q": lambda x: F.avg_pool2d(F.max_pool2d(x, 3, 1, 1), 2),
            }.get(layer, lambda x, i=i: block(x, f"features.{i}"))(x)
    return x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]


@pytest.mark.parametrize("size", [(128, 128), (100, 70)])
@pytest.mark.parametrize(
    ("options", "layers"),
    [({}, "cnrpbpbbpbknr"), ({"se": 0, "blur": True, "stem": (4, 6)}, "cnrsnrqbqbbqbknr")],
    ids=["first", "blurred, no excitation, deep stem"],
)
def test_it_computes_its_layers(size, options, layers):
    torch.manual_seed(0)
    shape = replace(Shape((8,), (8, 16, 32), (1, 2, 1), 128), **options)
    net = random_norms(SceneNet(7, shape)).double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = scene_net_by_hand(net.state_dict(), x, layers)
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("shape", [Shape(), *SHAPES.values()])
def test_a_shape_survives_a_file(shape):
    assert Shape.load(json.loads(json.dumps(shape.save()))) == shape


@pytest.mark.parametrize(
    "wrong",
    [
        {"widths": [64, 128]},
        {"widths": [64, 128, 10**6]},
        {"depths": [1, 3, 400]},
        {"depths": "abc"},
        {"se": 100},
        {"drop_path": 1.5},
        {"unknown": 1},
        {"features": "many"},
    ],
    ids=str,
)
def test_a_senseless_shape_is_refused(wrong):
    with pytest.raises((ValueError, TypeError)):
        Shape.load(Shape().save() | wrong)


def blocks_of(net: SceneNet) -> list[Block]:
    return [layer for layer in net.features if isinstance(layer, Block)]


def test_a_new_block_passes_its_shortcut_on():
    x = torch.rand(2, 8, 6, 6)
    for block in blocks_of(narrow_scene_net(7).eval()):
        expected, x = block.shortcut(x).relu(), block(x)
        assert x.any() and torch.equal(x, expected)


def test_later_blocks_are_skipped_more_often_and_none_in_evaluation():
    torch.manual_seed(0)
    net = random_norms(narrow_scene_net(7, depths=(1, 2, 1), drop_path=0.4))
    rates = [block.drop_path.drop_prob for block in blocks_of(net)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])
    last = blocks_of(net)[-1]
    x = torch.rand(600, last.branch[0].in_channels, 2, 2)
    skipped = (last(x) == last.shortcut(x).relu()).flatten(1).all(1)
    assert skipped.float().mean().item() == pytest.approx(0.4, abs=0.08)
    last.eval()
    assert not (last(x) == last.shortcut(x).relu()).flatten(1).all(1).any()


class Counting(nn.Module):
    """Answers by the left and right halves of an image, and counts the images it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.scale = 0, nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.seen += len(x)
        return x.mean((1, 2))[:, [0, -1]] * self.scale


def test_mirror_images_are_averaged_in_evaluation_alone():
    """Neither training nor its validation nor SceneNet itself does it."""
    batches = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))]
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scheduler = optim.make_scheduler(optimizer, 0.0, 0, epochs=1, steps=1, done=0)
    plain, flip_tta = (EpochMetrics(CPU.device) for _ in range(2))
    parts = (model, batches, Standard(), optimizer, scheduler, CPU, plain, StepTimer())
    engine.train_epoch(*parts, seed=0)
    assert model.seen == 4
    engine.evaluate(model, batches, CPU, plain, StepTimer())
    assert model.seen == 8
    engine.evaluate(model, batches, CPU, plain, StepTimer(), flip_tta)
    assert model.seen == 16
    net, x = random_norms(narrow_scene_net(7)).eval(), batches[0][0]
    assert not torch.allclose(net(x), net(x.flip(3)))


# ---- The recipe


def test_the_flag_brings_its_recipe_and_given_flags_win():
    args = parsed("--use-scene-net")
    assert {name: getattr(args, name) for name in SCENE_NET} == SCENE_NET
    args = parsed("--use-scene-net", "--lr=0.1", "--wd=0", "--ema=0", "--cutmix=1")
    assert (args.lr, args.wd, args.ema, args.cutmix) == (0.1, 0.0, 0.0, 1.0)
    assert args.label_smoothing == SCENE_NET["label_smoothing"]
    args = parsed("--use-scene-net", "--recipe=cpu", "--epochs=9")
    assert {name: getattr(args, name) for name in CPU_RECIPE} == CPU_RECIPE | {"epochs": 9}
    for words in ([], ["--use-vit"], ["--use-resnet18"]):
        args = parsed(*words)
        assert (args.lr, args.wd) == (0.1, 1e-4)  # the contract's
        assert not (args.label_smoothing or args.cutmix or args.ema)


def test_attacked_batches_are_not_mixed(capsys):
    assert parsed("--use-scene-net", "--pgd").cutmix == 0
    with pytest.raises(SystemExit):
        parsed("--use-scene-net", "--at=free", "--cutmix=0.5")
    assert "--cutmix mixes images and --at attacks whole ones" in capsys.readouterr().err


def test_kernels_and_matrices_alone_decay():
    net = narrow_scene_net(7, depths=(1, 1))
    optimizer = optim.make_optimizer(net, "scene_net", lr=1, wd=0.5, momentum=0.9)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        layer = net.get_submodule(name.rpartition(".")[0])
        decays = name.endswith("weight") and not isinstance(layer, nn.BatchNorm2d)
        torch.testing.assert_close(p.detach(), before[name] * (0.5 if decays else 1))


def mixed_batch(prob: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network and the loss are given of a batch whose image i is i all over."""
    given = []
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 24).contiguous()
    torch.manual_seed(seed)
    objective = CutMix(lambda logits, target: given.append(target), 9, prob)
    x = x.to(memory_format=torch.channels_last)
    objective.begin_batch(0)
    objective(lambda x: given.append(x) or x, x, torch.arange(8))
    return given[0], given[1]


def test_labels_count_by_their_share_of_the_area():
    for seed in range(20):
        x, target = mixed_batch(1.0, seed)
        assert target.shape == (8, 9)
        for i in range(8):
            shares = torch.stack([(x[i, 0] == k).float().mean() for k in range(9)])
            torch.testing.assert_close(target[i], shares)
            inside = x[i, 0] != i  # one rectangle, the neighbour's
            assert set(x[i, 0][inside].tolist()) <= {(i - 1) % 8}
            assert int(inside.sum()) == int(inside.any(0).sum() * inside.any(1).sum())


def test_the_given_share_of_batches_is_mixed_and_a_seed_repeats_it():
    mixed = [mixed_batch(0.5, seed) for seed in range(100)]
    assert sum(target.dim() == 2 for _, target in mixed) == pytest.approx(50, abs=15)
    whole = [(x, target) for x, target in mixed if target.dim() == 1]
    assert all(torch.equal(x[:, 0, 0, 0], target.float()) for x, target in whole)
    again = mixed_batch(0.5, 7)
    assert all(map(torch.equal, mixed[7], again))


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_mean_of_weights_is_the_formula_and_answers_for_itself(amp):
    torch.manual_seed(0)
    model, _ = prepare_model(narrow_scene_net(7, depths=(1, 1), drop_path=0), CPU.device, amp)
    average = optim.make_ema(model, 0.5, total_steps=8, done=0)
    expected, decay = {}, 1 - 1 / (0.5 * 8)
    for _ in range(4):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.rand(value.shape) / 9 if value.is_floating_point() else 1)
        average.update(model)
        for name, value in model.state_dict().items():
            old = expected.get(name, value)  # the first update copies
            mean = decay * old + (1 - decay) * value
            expected[name] = (mean if value.is_floating_point() else value).clone()
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    other, context = prepare_model(narrow_scene_net(7, depths=(1, 1)), CPU.device, amp)
    other.load_state_dict(expected)
    x, _ = context.to_device(torch.randn(2, 3, 64, 64), torch.zeros(2))
    logits = average.module.eval()(x)
    torch.testing.assert_close(logits, other.eval()(x), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits, model.eval()(x), rtol=0.05)


def test_no_mean_is_kept_where_none_is_asked_for():
    model = nn.Linear(2, 2)
    assert optim.make_ema(model, 0, 10, 0) is None
    short = optim.make_ema(model, 0.05, 10, 0)  # shorter than a step
    for _ in range(2):
        nn.init.normal_(model.weight)
        short.update(model)
        assert torch.equal(short.module.weight, model.weight)


# ---- A run of main.py


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "scenes"
    command = [sys.executable, "make_sample_data.py", str(folder), "--train", "40", "--val", "20"]
    subprocess.run(command, cwd=CODE, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """main.py in this process, with a narrow SceneNet: words -> exit code."""
    logs = tmp_path_factory.mktemp("scene_net") / "logs"
    narrow = {"scene_net": lambda n, shape=None: narrow_scene_net(n, width=16)}

    def run(*words: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "MODEL_REGISTRY", registry.MODEL_REGISTRY | narrow)
            words = [*map(str, words), "--gpu=-1", "-j=0", "-p=100"]
            return main.main(words, logs)

    run.logs, run.narrow = logs, narrow
    return run


@pytest.fixture(scope="module")
def trained(call, drawn) -> Path:
    words = ["--use-scene-net", "--epochs=8", "--lr=0.05", "--warmup=1", "-b=32", "--cache=ram"]
    assert call(drawn, *words) == 0
    (folder,) = call.logs.glob("scene_net_exp_*")
    return folder


def test_it_learns_the_drawn_scenes(trained):
    rows = read_metrics(trained / "metrics.jsonl")
    assert rows[-1]["val_top1_accuracy"] >= 20  # of 200 images; chance: 10, no learning: 14 at most
    config = json.loads((trained / "config.json").read_text())
    assert config["kind"] == "scene_net" and config["arguments"]["wd"] == SCENE_NET["wd"]


def test_the_mean_is_what_is_validated_saved_and_looked_at(trained, call, drawn, capsys):
    models = trained / "models"
    last, best = (checkpoint.load(models / name) for name in (checkpoint.LAST, checkpoint.BEST))
    assert best["kind"] == "scene_net" and "trained" not in best
    assert not torch.equal(last["state_dict"]["fc.weight"], last["trained"]["fc.weight"])
    assert call(drawn, f"--resume={models / checkpoint.BEST}", "-e") == 0
    plain = capsys.readouterr().out.split("Single images:\n")[1].splitlines()[0]
    assert plain.startswith(f"******Acc@1 {best['best_acc1']:.3f}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "MODEL_REGISTRY", registry.MODEL_REGISTRY | call.narrow)
        net = records.read_runs([trained])[0].network
    assert torch.equal(net.fc.weight, best["state_dict"]["fc.weight"])


def test_a_resume_keeps_network_and_settings(trained, call, drawn):
    words = [
        "--epochs=9",
        f"--resume={trained / 'models/checkpoint.pth.tar'}",
    ]
    assert call(drawn, *words) == 0
    config = json.loads((trained / "config.json").read_text())
    assert config["kind"] == "scene_net"
    expected = SCENE_NET | {"lr": 0.05, "warmup": 1.0, "batch_size": 32, "epochs": 9}
    assert {k: config["arguments"][k] for k in expected} == expected


def test_adversarial_training_and_half_precision_go_with_it(call, drawn, capsys):
    words = ["--use-scene-net", "--epochs=1", "-b=200", "--warmup=0", "--lr=0.02", "--amp=bf16"]
    assert call(drawn, *words, "--pgd", "--pgd-steps=1") == 0
    assert "Robust accuracy" in capsys.readouterr().out


def test_spoilt_weights_under_training_are_one_line(trained, call, drawn, tmp_path, capsys):
    content = checkpoint.load(trained / "models" / checkpoint.LAST)
    for wrong, line in (
        ("x", "its part 'trained' is invalid"),
        ({"fc.weight": torch.zeros(2)}, "does not fit the network"),
    ):
        checkpoint.save(tmp_path / "spoilt.pth.tar", {**content, "trained": wrong})
        assert call(drawn, "--epochs=20", "-b=16", f"--resume={tmp_path / 'spoilt.pth.tar'}") == 1
        assert line in capsys.readouterr().err
