"""Two real processes over gloo: the losses and counts of one, nothing lost, nothing written twice.

torchrun itself starts the run that loses a process; the others are forked from a server that has
main.py imported.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import fork_server
import pytest
import torch
from small_network import narrow_scene_net
from torch import nn

import main
from custom_dataloader import MiniPlacesLoader
from deepvision import checkpoint
from deepvision.data.loader import ResumableBatchSampler, training_batches, validation_batches
from deepvision.models import registry
from deepvision.runtime import distributed
from deepvision.training.engine import step_seed
from utils import UserError

if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

CODE = Path(main.__file__).parent


def forgetful(net: nn.Module) -> nn.Module:
    """Its statistics are those of the latest images alone, and so another process's are others."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    return net


SERVER = multiprocessing.get_context("forkserver")
BUILDERS = {
    "torch_conv": lambda n: nn.Sequential(
        nn.Conv2d(3, 8, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(2048, n)
    ),
    "vit": lambda n: Spare(n),
    "scene_net": lambda n, shape=None: forgetful(narrow_scene_net(n)),
}
TRAIN = ["--epochs=2", "-b=16", "--lr=0.02", "--warmup=1", "-p=1"]


@pytest.fixture(scope="module", autouse=True)
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(CODE))
        fork_server.restart()


def child(words, logs, output, environment):
    os.environ |= environment
    with open(output, "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(CODE)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    registry.MODEL_REGISTRY = BUILDERS
    sys.exit(main.main(words, logs))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(folder: Path, *words: str, processes: int = 2) -> str:
    """The output of main.py, run by so many processes at once; by one, without torchrun's ways."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(processes)}
    output = folder / f"output_{time.monotonic_ns()}.txt"
    started = [
        SERVER.Process(
            target=child,
            args=(
                [*words, "--gpu=-1", "-j=0"],
                folder / "logs",
                output,
                {} if processes == 1 else {**common, "RANK": str(i), "LOCAL_RANK": str(i)},
            ),
        )
        for i in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    text = output.read_text()
    assert codes == [0] * processes, text
    return text


def run_folder(folder: Path) -> Path:
    [only] = (folder / "logs").glob("*_exp_*")
    return only


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def one(sample_root, tmp_path_factory):
    """The folder in which a single process has trained, and its output."""
    folder = tmp_path_factory.mktemp("one")
    return folder, run(folder, str(sample_root), *TRAIN, processes=1)


def test_two_processes_train_like_one(sample_root, tmp_path, one):
    alone, text = one
    both = run(tmp_path, str(sample_root), *TRAIN)
    assert both.count("Epoch: [1][0/5]") == both.count("******Acc@1") - 1 == 1  # one prints
    paths = [run_folder(f) / "models" / checkpoint.LAST for f in (alone, tmp_path)]
    contents = [checkpoint.load(path) for path in paths]
    for name, weight in contents[0]["state_dict"].items():
        torch.testing.assert_close(contents[1]["state_dict"][name], weight, rtol=1e-4, atol=1e-6)
    metrics = [rows(run_folder(f) / "metrics.jsonl") for f in (alone, tmp_path)]
    for theirs, ours in zip(*metrics, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        for name in ("train_top1_accuracy", "val_top1_accuracy", "val_top5_accuracy"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4)


def test_two_processes_validate_the_mean_that_they_save(sample_root, tmp_path):
    """Of statistics, too, which follow the images that each has seen."""
    run(
        tmp_path,
        str(sample_root),
        *TRAIN,
        "--use-scene-net",
        "--ema=0.01",
        "--epochs=6",
        "--lr=0.2",
    )
    folder = run_folder(tmp_path)
    alone = run(
        tmp_path,
        str(sample_root),
        f"--resume={folder / 'models' / checkpoint.LAST}",
        "-e",
        processes=1,
    )
    last = rows(folder / "metrics.jsonl")[-1]
    plain = alone.split("Single images:\n")[1].splitlines()[0]
    assert (
        plain
        == f"******Acc@1 {last['val_top1_accuracy']:.3f} Acc@5 {last['val_top5_accuracy']:.3f}"
    )


@pytest.mark.parametrize("look", ["-e", "-a"])
def test_two_processes_count_the_hits_of_one(sample_root, one, look):
    """On the same checkpoint, mirror-averaged or attacked; one row is written."""
    best = run_folder(one[0]) / "models" / checkpoint.BEST
    found = []
    for processes in (1, 2):
        run(one[0], str(sample_root), look, f"--resume={best}", processes=processes)
        found.append(rows(run_folder(one[0]) / "evaluations.jsonl")[-1])
    assert {k: v for k, v in found[0].items() if k != "date"} == {
        k: v for k, v in found[1].items() if k != "date"
    }
    (run_folder(one[0]) / "evaluations.jsonl").unlink()


@pytest.mark.parametrize("words", [["free"], ["trades"], ["trades", "--use-scene-net"]], ids=str)
def test_adversarial_training_goes_on_in_step(sample_root, tmp_path, words):
    """Each mode runs the network another number of times per step of the optimizer.

    With normalisation, the second pass of a step must leave what the first has saved.
    """
    mode, *network = words
    text = run(tmp_path, str(sample_root), *TRAIN, *network, f"--at={mode}", "--pgd-prob=0.5")
    assert text.count("Robust accuracy") == 2
    assert len(rows(run_folder(tmp_path) / "metrics.jsonl")) == 2


class Spare(nn.Module):
    """Has a layer that takes no part in the output, as some answers do."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc, self.spare = nn.Linear(3, num_classes), nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def test_a_network_with_an_unused_layer_trains(sample_root, tmp_path):
    run(tmp_path, str(sample_root), *TRAIN, "--use-vit")
    assert len(rows(run_folder(tmp_path) / "metrics.jsonl")) == 2


def test_the_noise_of_a_step_differs_between_processes():
    seeds = {step_seed(1, 2), *(step_seed(1, 2, rank) for rank in range(8))}
    assert len(seeds) == 9


def test_torchruns_report_ends_with_our_line(sample_root, tmp_path):
    words = ["--standalone", "--nproc_per_node=2", str(CODE / "main.py"), str(tmp_path / "nowhere")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, "--gpu=-1"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    report = done.stderr.partition("Root Cause")[2]
    assert done.returncode != 0
    assert f"error: there is no folder {tmp_path / 'nowhere'}" in report and "Trace" not in report


def test_an_early_end_keeps_its_cause(monkeypatch):
    monkeypatch.setattr(distributed, "launch_id", lambda: "test")
    monkeypatch.setattr(distributed, "init_process_group", lambda backend: None)
    join = distributed.process_group(torch.device("cpu"))
    with pytest.raises(UserError, match="Duplicate GPU detected") as error, join:
        raise torch.distributed.DistBackendError("NCCL error: Duplicate GPU detected\nmore")
    assert isinstance(error.value.__cause__, torch.distributed.DistBackendError)


def test_shares_are_parts_of_the_same_batches(sample_root):
    whole, halves = (
        ResumableBatchSampler(23, 6, 1),
        [ResumableBatchSampler(23, 6, 1, slice(i, None, 2)) for i in (0, 1)],
    )
    for batch, *parts in zip(whole, *halves, strict=True):
        assert sorted(sum(parts, [])) == sorted(batch) and [len(p) for p in parts] == [3, 3]
    for n in (1, 99, 100, 101, 102, 201, 203):
        images = torch.utils.data.TensorDataset(torch.arange(max(n, 3)))
        for size in (1, 2, 3):
            loaders = [
                validation_batches(images, 0, share=slice(i, None, size)) for i in range(size)
            ]
            assert len({len(loader) for loader in loaders}) == 1
            seen = [x.item() for loader in loaders for (batch,) in loader for x in batch]
            assert sorted(seen) == list(range(max(n, 3)))


MAIN_WITH_A_DEATH = """
import os, sys, signal; sys.path.insert(0, sys.argv.pop(1))
from pathlib import Path
import main
from deepvision.runtime import distributed
mark, count, sync = Path(__file__).with_name('killed'), iter(range(9)), distributed.sync_buffers
def die_in_epoch_2(model):
    if os.environ['RANK'] == sys.argv[0][-4] and not mark.exists() and next(count) == 1:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    sync(model)
distributed.sync_buffers = die_in_epoch_2
sys.exit(main.main(sys.argv[1:], Path(__file__).parent / 'logs'))
"""


@pytest.mark.parametrize(
    ("killed", "where"),
    [(1, ["--standalone", "--nproc_per_node=2"]), (0, ["--nnodes=2", "--rdzv-backend=c10d"])],
    ids=["one machine", "two nodes"],
)
def test_a_killed_process_is_replaced_and_the_run_goes_on(killed, where, sample_root, tmp_path):
    """torchrun --max-restarts: both start again, at the last checkpoint of this very run."""
    script = tmp_path / f"kill_{killed}.py"
    script.write_text(MAIN_WITH_A_DEATH)
    older = tmp_path / "logs" / "vit_exp_2099-01-01_00-00-00"
    (older / "models").mkdir(parents=True)
    if two_nodes := "--nnodes=2" in where:
        where = [*where, f"--rdzv-endpoint=localhost:{free_port()}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where, "--max-restarts=1"]
    words = [str(CODE), str(sample_root), *TRAIN, "--epochs=3", "--gpu=-1", "-j=0", "-p=100"]
    nodes = [
        subprocess.Popen(
            [*torchrun, str(script), *words, "--save-every=2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(1 + two_nodes)
    ]
    said = "".join(node.communicate(timeout=200)[0] for node in nodes)
    assert [node.returncode for node in nodes] == [0] * len(nodes), said
    assert (tmp_path / "killed").exists()
    [folder] = (tmp_path / "logs").glob("torch_conv_exp_*")
    assert said.count("SimpleNet, epochs done: 1") == 1
    assert [row["epoch"] for row in rows(folder / "metrics.jsonl")] == [1, 2, 3]


def test_a_batch_that_does_not_divide_is_refused(sample_root):
    with pytest.raises(UserError, match="-b 15 does not divide among 2 processes"):
        training_batches(MiniPlacesLoader(sample_root), 15, 1, 0, share=slice(0, None, 2))
