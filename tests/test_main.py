"""main.py as its users run it, on the drawn sample data; in its own process where that matters."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import main
from deepvision.runtime import run_logger

CODE = Path(__file__).parent.parent / "code"
CPU = ["--gpu=-1", "-j", "1", "-p", "2", "-b", "16"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of code/ with an empty logs/ next to it, so that no run is in the checkout."""
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(CODE, root / "code", ignore=shutil.ignore_patterns("__pycache__"))
    return root


def command(tree, *words):
    return {"args": [sys.executable, "main.py", *map(str, words)], "cwd": tree / "code"}


def run(tree, *words):
    done = subprocess.run(
        **command(tree, *words), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def call(tree, *words, code=0):
    """The same in this process, without the seconds that imports take."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.main([str(word) for word in words], tree / "logs")
    assert status == code, out.getvalue() + err.getvalue()
    return out.getvalue() if code == 0 else err.getvalue()


def runs(tree):
    return sorted((tree / "logs").glob("*_exp_*"), key=lambda folder: folder.name[-19:])  # date


def weights(folder, name="checkpoint.pth.tar"):
    return torch.load(folder / "models" / name, weights_only=True)["state_dict"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_clock(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in run_logger.MACHINE_COLUMNS} for row in rows]


def scalars(folder, tag):
    events = EventAccumulator(str(folder)).Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


@pytest.fixture(scope="module")
def trained(tree, sample_root):
    """(console output, run folder) of three epochs of SimpleNet."""
    out = run(tree, sample_root, "--epochs=3", "--warmup=1", "--lr=0.02", *CPU)
    return out, runs(tree)[0]


def test_lines_that_people_grep_for(trained):
    out, _ = trained
    number = r"\d+\.\d+"
    pair = rf"{number} \({number}\)"
    train = rf"^Epoch: \[1\]\[0/\d+\]\tTime {pair}\tData {pair}\tLoss {pair}\tAcc@1 {pair}\tAcc@5"
    assert re.search(train, out, re.M)
    assert re.search(rf"^Test: \[0/\d+\]\tTime {pair}\tAcc@1 {pair}\tAcc@5 {pair}$", out, re.M)
    assert re.search(rf"^\*{{6}}Acc@1 {number} Acc@5 {number}$", out, re.M)


def test_folder_files_and_keys(trained):
    _, folder = trained
    assert re.fullmatch(r"torch_conv_exp_\d{4}(-\d\d){2}_\d\d(-\d\d){2}", folder.name)
    last = torch.load(folder / "models/checkpoint.pth.tar", weights_only=True)
    best = torch.load(folder / "models/model_best.pth.tar", weights_only=True)
    keys = {"epoch", "model_arch", "state_dict", "best_acc1", "optimizer", "scheduler"}
    assert keys <= last.keys() and "optimizer" not in best
    assert (last["epoch"], last["model_arch"]) == (3, "simplenet")
    rows = without_clock(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert best["best_acc1"] == max(row["val_top1_accuracy"] for row in rows)
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["lr"] == 0.02 and config["kind"] == "torch_conv"


def test_tensorboard_has_the_contracts_tags(trained):
    _, folder = trained
    losses = scalars(folder, "data/training_loss")
    rates = scalars(folder, "data/learning_rate")
    assert [s for s, _ in losses] == [s for s, _ in rates]
    assert rates[0] == (0, 0.0) and max(v for _, v in rates) <= 0.02 + 1e-9
    rows = without_clock(folder)
    for tag in ("top1_accuracy", "top5_accuracy"):
        for name in ("train", "val"):
            points = scalars(folder / name, f"data/{tag}")
            assert points == [(r["epoch"], pytest.approx(r[f"{name}_{tag}"])) for r in rows]
    best = scalars(folder, "data/top1_accuracy")
    tops = [row["val_top1_accuracy"] for row in rows]
    assert [v for _, v in best] == pytest.approx([max(tops[: i + 1]) for i in range(len(tops))])


def test_tensorboard_shows_the_settings_beside_the_best_accuracy(trained):
    _, folder = trained
    summaries = EventAccumulator(str(folder)).Reload().summary_metadata
    start, experiment = (
        HParamsPluginData.FromString(summaries[f"_hparams_/{name}"].plugin_data.content)
        for name in ("session_start_info", "experiment")
    )
    values = start.session_start_info.hparams
    assert values["lr"].number_value == 0.02 and values["network"].string_value == "SimpleNet"
    assert len(values) <= 4  # with more, the accuracy is not visible at 1280 pixels
    (metric,) = experiment.experiment.metric_infos
    assert scalars(folder, metric.name.tag)


def test_evaluation_tells_the_plain_and_last_the_mirrored_accuracy(tree, trained, sample_root):
    _, folder = trained
    best = folder / "models/model_best.pth.tar"
    out = call(tree, sample_root, f"--resume={best}", "-e", "-v", *CPU)
    finals = [line for line in out.splitlines() if line.startswith("******")]
    assert len(finals) == 2
    acc1 = torch.load(best, weights_only=True)["best_acc1"]
    assert finals[0].startswith(f"******Acc@1 {acc1:.3f} ")
    rows = (folder / "evaluations.jsonl").read_text().splitlines()
    mirrored = json.loads(rows[-1])["mirrored_top1"]
    assert len(rows) == 1 and finals[1].startswith(f"******Acc@1 {mirrored:.3f} ")
    again = call(tree, sample_root, f"--resume={best}", "-e", *CPU)
    assert [line for line in again.splitlines() if line.startswith("******")] == finals
    images = EventAccumulator(str(folder)).Reload().Images("Image/Image")
    assert [image.step for image in images] == [0]
    assert len(runs(tree)) == 1


def test_attack_tells_both_accuracies_its_budget_and_shows_pictures(tree, trained, sample_root):
    _, folder = trained
    out = call(tree, sample_root, f"--resume={folder}/models/model_best.pth.tar", "-a", "-v", *CPU)
    finals = re.findall(r"^\*{6}Acc@1 (\S+)", out, re.M)
    best = torch.load(folder / "models/model_best.pth.tar", weights_only=True)
    assert len(finals) == 2 and finals[0] == f"{best['best_acc1']:.3f}"
    assert float(finals[1]) <= float(finals[0])
    assert "ε = 0.1 normalised = (5.84, 5.71, 5.74)/255" in out
    tags = EventAccumulator(str(folder)).Reload().Tags()["images"]
    assert {"Image/Org_Image", "Image/Adv_Image", "Image/Difference_x10"} <= set(tags)


def interrupt(tree, sample_root, lines, *words):
    """Start a run, press Ctrl-C after so many training lines, return (exit code, output)."""
    process = subprocess.Popen(
        **command(tree, sample_root, *words, "-p", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    out, seen = "", 0
    while seen < lines:
        line = process.stdout.readline()
        assert line, out
        out, seen = out + line, seen + line.startswith("Epoch:")
    process.send_signal(signal.SIGINT)
    out += process.communicate(timeout=120)[0]
    return process.returncode, out


def test_a_stopped_run_resumes_to_the_very_same_end(tree, trained, sample_root):
    """Mid-epoch, in the second of three epochs; weights, rows and curves end up the same.

    test_resume.py has other signals, moments and networks.
    """
    _, whole = trained
    words = ["--epochs=3", "--warmup=1", "--lr=0.02", *CPU, "--save-every=2"]
    steps = len(scalars(whole, "data/training_loss")) * 2 // 3  # printed every second
    time.sleep(1)
    status, out = interrupt(tree, sample_root, steps + 3, *words)
    assert status == 130, out
    folder = runs(tree)[-1]
    assert folder != whole
    last = folder / "models/checkpoint.pth.tar"
    printed = r"^  python main\.py .*--resume=\S*checkpoint\.pth\.tar --gpu=-1 --workers=1$"
    assert re.search(printed, out, re.M)
    assert torch.load(last, weights_only=True)["progress"]["position"] > 0
    call(tree, sample_root, *words, f"--resume={last}")
    assert same(weights(folder), weights(whole))
    best = "model_best.pth.tar"
    assert same(weights(folder, best), weights(whole, best))
    assert without_clock(folder) == without_clock(whole)
    resumed = dict(scalars(folder, "data/training_loss"))
    assert all(resumed[s] == v for s, v in scalars(whole, "data/training_loss"))
    assert len(scalars(folder, "data/training_loss")) == len(resumed)


def test_a_finished_run_goes_on_with_more_epochs(tree, trained, sample_root, tmp_path):
    _, whole = trained
    folder = tree / "logs" / "torch_conv_exp_2000-01-01_00-00-00"
    shutil.copytree(whole, folder)
    last = f"--resume={folder}/models/checkpoint.pth.tar"
    assert "raise --epochs" in call(tree, sample_root, "--epochs=3", last, *CPU)
    call(tree, sample_root, "--epochs=4", "--warmup=1", "--lr=0.02", last, *CPU)
    rows = without_clock(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[:3] == without_clock(whole)


def test_an_old_course_checkpoint_resumes(tree, trained, sample_root, tmp_path):
    """No scheduler, no kind, a wrapper's prefix: judged by keys and shapes."""
    content = torch.load(trained[1] / "models/checkpoint.pth.tar", weights_only=True)
    old = {
        "epoch": 3,
        "model_arch": "CNN",
        "state_dict": {"module." + k: v for k, v in content["state_dict"].items()},
        "best_acc1": torch.tensor(12.5),
    }
    torch.save(old, tmp_path / "old.pth.tar")
    time.sleep(1)
    before = runs(tree)
    out = call(
        tree, sample_root, "--epochs=4", "--lr=0.01", f"--resume={tmp_path}/old.pth.tar", *CPU
    )
    assert "no optimizer state" in out and "Epoch: [4][0/" in out and "Epoch: [1]" not in out
    assert len(runs(tree)) == len(before) + 1


@pytest.mark.parametrize(
    ("flags", "kind", "network"),
    [
        (["--use-custom-conv"], "custom_conv", "SimpleNet on CustomConv2d"),
        (["--use-vit", "--lr=0.001"], "vit", "SimpleViT"),
        (["--pgd=True"], "torch_conv", "SimpleNet"),
    ],
)
def test_each_kind_trains_and_is_recognised(tree, sample_root, flags, kind, network):
    time.sleep(1)
    call(tree, sample_root, "--epochs=1", *flags, *CPU)
    folder = runs(tree)[-1]
    assert folder.name.startswith(f"{kind}_exp_")
    losses = [v for _, v in scalars(folder, "data/training_loss")]
    assert all(0 < v < 100 for v in losses)
    out = call(tree, sample_root, f"--resume={folder}/models/model_best.pth.tar", "-e", *CPU)
    assert f"{network}, epochs done: 1" in out


BAD = [
    (["-e"], 2, r"-e looks at a checkpoint"),
    (["-a"], 2, r"-a looks at a checkpoint"),
    (["-e", "-a", "--resume=x"], 2, r"-e and -a exclude each other"),
    (["-v"], 2, r"-v shows what -e or -a"),
    (["--use-vit", "--use-resnet18"], 2, r"--use-vit and --use-resnet18 exclude each other"),
    (["--pgd", "-e", "--resume=x"], 2, r"--pgd trains"),
    (["--pgd=maybe"], 2, r"neither True nor False"),
    (["--epochs=0"], 2, r"0 is out of range: it must be at least 1"),
    (["-b", "0"], 2, r"at least 1"),
    (["--lr=-1"], 2, r"at least 0"),
    (["--lr=nan"], 2, r"out of range"),
    (["--momentum=2"], 2, r"from 0 to 1"),
    (["--gpu=-2"], 2, r"at least -1"),
    (["--gpu=99"], 1, r"--gpu: (PyTorch finds no CUDA GPU here|GPU 99 does not exist)"),
    (["--gpu=x"], 1, r"--gpu x: expected auto, cpu, mps, cuda or cuda:N"),
    (["--use-mps"], 2, r"--use-mps and --gpu exclude each other"),
    (["--lr=inf"], 2, r"inf is out of range"),
    (["--warmup=inf"], 2, r"inf is out of range"),
    (["--seed=4294967296"], 2, r"from 0 to 4294967295"),
    (["-j=100000"], 2, r"from 0 to 256"),
    (["--epochs=1.5"], 2, r"invalid int value"),
    (["--pgd-steps=5"], 2, r"--pgd-steps needs --pgd"),
    (["--pgd-blend=1", "--pgd=False"], 2, r"--pgd-blend needs --pgd"),
    (["--at=free", "--pgd-steps=0"], 2, r"at least once"),
    (["--at=trades", "--pgd-blend=0.5"], 2, r"--pgd-blend is not part of --at=trades"),
    (["--at=free", "--pgd"], 2, r"leave it or --at=free out"),
    (["--best-by=robust"], 2, r"--best-by needs --pgd or --at"),
    (["--weights=x", "-e", "--resume=x"], 2, r"by either --resume or --weights"),
    (["--views", "--resume=x"], 2, r"--views needs -e"),
    (["--views", "-e", "--resume=x", "--cache=device"], 2, r"use --cache=ram"),
    (["--recipe=cpu"], 2, r"add --use-scene-net"),
    (["--resolution=96,128"], 2, r"'96,128' is no schedule"),
    (["--use-vit", "--resolution=96"], 1, r"leave --resolution out"),
    (["--weights=nowhere"], 1, r"no checkpoint at nowhere"),
    (["--start-epoch=1"], 2, r"--start-epoch 1 leaves nothing of --epochs 1"),
    (["--start-epoch=1", "--resume=x"], 2, r"--resume knows how many epochs"),
    (["--check-data", "-a", "--resume=x"], 2, r"--check-data does nothing else"),
    (["--resume=auto", "-e"], 1, r"there is no run to look at"),
    (["--amp=fp16"], 1, r"use --amp=bf16"),
    (["--cache=tape"], 2, r"invalid choice: 'tape'"),
    (["--save-every=soon"], 2, r"not an interval"),
    (["-b", "100000"], 1, r"100000"),
    (["--resume=missing.pth.tar"], 1, r"no checkpoint at missing\.pth\.tar"),
]


@pytest.mark.parametrize(("flags", "code", "message"), BAD, ids=lambda v: str(v)[:40])
def test_a_mistake_gets_one_line_and_creates_nothing(
    sample_root, tmp_path, capsys, flags, code, message
):
    try:
        status = main.main([str(sample_root), "--epochs=1", *CPU, *flags], tmp_path / "logs")
    except SystemExit as e:
        status = e.code
    err = capsys.readouterr().err
    assert status == code
    assert re.search(message, err) and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "logs").exists()


def test_a_resume_does_without_what_this_machine_lacks(trained, sample_root, tmp_path, capsys):
    ckpt = torch.load(trained[1] / "models/checkpoint.pth.tar", weights_only=True)
    ckpt["config"] |= {"amp": "fp16", "cache": "device", "epochs": 4}
    torch.save(ckpt, path := tmp_path / "checkpoint.pth.tar")
    words = [str(sample_root), f"--resume={path}", *CPU]
    assert main.main(words, tmp_path / "logs") == 0
    assert "--amp=bf16; this run continues without it." in capsys.readouterr().out
    (folder,) = (tmp_path / "logs").iterdir()
    arguments = json.loads((folder / "config.json").read_text())["arguments"]
    assert (arguments["amp"], arguments["cache"]) == ("off", "device")
    assert len(without_clock(folder)) == 1


def test_an_unreadable_image_stops_the_run_by_name(tree, sample_root, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(sample_root, root)
    name = (root / "train.txt").read_text().split()[0]
    (root / "images" / name).write_bytes(b"<html>not found</html>")
    err = call(tree, root, "--epochs=1", *CPU, code=1)
    assert name in err and "Traceback" not in err


def test_missing_data_is_one_line(tree, tmp_path):
    err = call(tree, tmp_path / "nowhere", "--epochs=1", *CPU, code=1)
    assert "nowhere" in err and len(err.strip().splitlines()) == 1


BARE = """
import sys
for name in ("simplejpeg", "matplotlib", "jinja2", "fpdf", "gdown"):
    sys.modules[name] = None  # to import it fails
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP reports its settings")
@pytest.mark.parametrize("module", ["main", "reverse_attack.train"])
@pytest.mark.parametrize("given, used", [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_has_set_otherwise(module, given, used):
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    env |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": given} if given else {})
    words = [sys.executable, "-c", f"import {module}"]
    done = subprocess.run(words, cwd=CODE, env=env, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY = '{used}'" in done.stderr


def test_torch_opencv_tensorboard_and_tqdm_are_enough_for_a_speedrun(sample_root, tmp_path):
    """As on a GPU machine that the internet cannot be reached from."""
    root = tmp_path / "tree"
    for part in ("code", "benchmarks"):
        shutil.copytree(CODE.parent / part, root / part)
    (root / "results").mkdir()
    (tmp_path / "sitecustomize.py").write_text(BARE)

    def run_bare(*words):
        bare = {**os.environ, "PYTHONPATH": str(tmp_path)}
        words = [sys.executable, *words]
        done = subprocess.run(words, cwd=root / "code", env=bare, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run_bare("main.py", sample_root, "--epochs=1", "--cache=device", *CPU)
    (folder,) = runs(root)
    record = folder / "metrics.jsonl"
    row = json.loads(record.read_text())
    record.write_text(json.dumps({**row, "images_per_second": None}))  # stopped as it validated
    run_bare("../benchmarks/speedrun_row.py", "name", folder)
    (row,) = json.loads((root / "results/speedrun.json").read_text())
    assert row["name"] == "name" and row["epochs"] == 1 and row["seconds"] > 0
