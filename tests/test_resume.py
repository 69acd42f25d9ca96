"""Runs that are killed at chosen points and resumed end bit by bit like an uninterrupted run.

Each run is main.py in a separate process, forked from a server that has it imported, with small
networks: benchmarks/torture.py takes the real ones and random moments.
"""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fork_server
import pytest
import torch
from benchmarks.run_state import final_state, points
from small_network import narrow_scene_net
from torch import nn

import main
import student_code
from deepvision import checkpoint
from deepvision.models import registry
from deepvision.runtime import atomic, event_file, run_logger
from deepvision.training import trainer

if not hasattr(os, "fork"):
    pytest.skip("needs fork and SIGKILL", allow_module_level=True)

CODE = Path(main.__file__).parent
BUILDERS = {
    "torch_conv": lambda n: nn.Sequential(
        nn.Conv2d(3, 8, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(2048, n)
    ),
    "vit": lambda n: student_code.SimpleViT(num_classes=n, embed_dim=32, depth=2, num_heads=2),
    "scene_net": lambda n, shape=None: narrow_scene_net(n, drop_path=0.3),
}
OWNERS = {
    "checkpoint": checkpoint,
    "file": atomic,
    "trainer": trainer,
    "logger": run_logger.RunLogger,
}
SERVER = multiprocessing.get_context("forkserver")
COMMON = ["--gpu=-1", "-b=32", "--epochs=3", "--lr=0.02", "--warmup=1", "-p=1", "--save-every=1"]
VARIANTS = {
    "no worker": ["-j=0"],
    "2 workers": ["-j=2", "--cache=device"],
    "adversarial": ["-j=1", "--at=free", "--best-by=robust", "--cache=ram"],
    "vit": ["-j=0", "--use-vit"],
    "mean of weights": ["-j=0", "--use-scene-net", "--ema=0.5", "--resolution=64:0.5,96"],
}


@pytest.fixture(scope="module", autouse=True)
def server():
    """Have the server import main.py, once; it knows no sys.path but this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(main.__file__))
        fork_server.restart()


def child(words: list[str], logs: Path, output: Path, kill: tuple | None) -> None:
    """A run of main.py; `kill`: (module, function, n, signals) kills at call n, from 0."""
    with open(output, "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(CODE)
    torch.set_num_threads(1)
    # what the run's own workers start by, elsewhere than in a forkserver's child
    multiprocessing.set_start_method("fork" if sys.platform == "linux" else "spawn", force=True)
    registry.MODEL_REGISTRY = BUILDERS
    if kill:
        module, name, count, *signals = kill
        owner = OWNERS[module]
        original, calls = getattr(owner, name), iter(range(10**6))

        def call(*args, **options):
            if next(calls) == count:
                for number in signals or [signal.SIGKILL]:
                    os.kill(os.getpid(), number)
            return original(*args, **options)

        setattr(owner, name, call)
    sys.exit(main.main(words, logs))


class Runs:
    """Runs with the same data and flags, their logs in one folder."""

    def __init__(self, data: Path, folder: Path, flags: list[str]) -> None:
        self.words = [str(data), *COMMON, *flags]
        self.logs, self.output = folder / "logs", folder / "output.txt"

    def start(self, *more: str, kill=None):
        arguments = ([*self.words, *more], self.logs, self.output, kill)
        process = SERVER.Process(target=child, args=arguments)
        process.start()
        return process

    def run(self, *more: str, kill=None) -> int:
        """The exit code."""
        process = self.start(*more, kill=kill)
        process.join(200)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"it hangs: {self.text()}")
        return process.exitcode

    def text(self) -> str:
        return self.output.read_text()

    def folders(self) -> list[Path]:
        return sorted(self.logs.glob("*_exp_*"))


@pytest.fixture(scope="module")
def whole(sample_root, tmp_path_factory):
    """The final state of each variant without a kill, made when asked for."""
    states = {}

    def state(variant: str) -> dict:
        if variant not in states:
            folder = tmp_path_factory.mktemp("whole")
            runs = Runs(sample_root, folder, VARIANTS[variant])
            assert runs.run() == 0, runs.text()
            states[variant] = final_state(runs.folders()[0])
        return states[variant]

    return state


KILLS = {  # two steps an epoch, a save after each and one at its end, where the best is saved, too
    "no worker": [("checkpoint", "save", 2), ("trainer", "evaluate", 1), ("file", "_link", 2)],
    "2 workers": [("file", "_sync_folder", 3)],
    "adversarial": [("logger", "log_epoch", 1)],
    "vit": [("logger", "log_step", 3)],
    "mean of weights": [("checkpoint", "save", 2), ("trainer", "evaluate", 1)],
}
OTHERWISE = {  # how the last part is run, where not as the others; it changes no bit
    "no worker": ["-j=1", "--cache=ram"],
    "adversarial": ["-j=0", "--cache=none"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_ends_as_if_nobody_had_touched_it(sample_root, tmp_path, whole, variant):
    """Killed mid-epoch, mid-write, before and after validation; points and rows end up alike."""
    runs = Runs(sample_root, tmp_path, VARIANTS[variant])
    for kill in KILLS[variant]:
        assert runs.run("--resume=auto", kill=kill) == -signal.SIGKILL, runs.text()
    assert runs.run("--resume=auto", *OTHERWISE.get(variant, [])) == 0, runs.text()
    assert len(runs.folders()) == 1
    assert final_state(runs.folders()[0]) == whole(variant)


SETTINGS = {  # between them, every setting that changes the result
    "standard": [
        "--label-smoothing=0.1",
        "--cutmix=0.5",
        "--ema=0.4",
        "--wd=0.01",
        "--momentum=0.8",
        "--seed=7",
        "--amp=bf16",
        "--deterministic",
        "--cache=ram",
        "--crop-area=0.5",
        "--rotation=3",
    ],
    "scene_net": ["--use-scene-net", "--recipe=cpu", "--resolution=64:0.5,96"],
    "vit": ["--use-vit", "--clip-grad=0.01", "--wd=0.1"],
    "adversarial": [
        "--at=pgd",
        "--at-eps=7",
        "--pgd-prob=0.7",
        "--pgd-steps=2",
        "--pgd-blend=0.3",
        "--best-by=robust",
    ],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resume_alone_continues_the_same_experiment(sample_root, tmp_path, name):
    """Batch size, epochs, learning rate, warmup and print frequency are not the defaults either."""
    untouched, stopped = (
        Runs(sample_root, tmp_path / part, ["-j=0", *SETTINGS[name]]) for part in ("a", "b")
    )
    for runs in (untouched, stopped):
        runs.logs.parent.mkdir()
    assert untouched.run() == 0, untouched.text()
    assert stopped.run(kill=("trainer", "evaluate", 1, signal.SIGTERM)) == 143, stopped.text()
    (folder,) = stopped.folders()
    stopped.words = [str(sample_root), "--gpu=-1", "-j=0", f"--resume={folder}"]
    assert stopped.run() == 0, stopped.text()
    assert final_state(folder) == final_state(untouched.folders()[0])
    history = json.loads((folder / "config.json").read_text())["history"]
    assert [entry.get("changed") for entry in history] == [None, {}]


def test_a_named_setting_is_changed_and_the_change_is_recorded(sample_root, tmp_path):
    runs = Runs(sample_root, tmp_path, ["-j=0"])
    assert runs.run(kill=("trainer", "evaluate", 1, signal.SIGTERM)) == 143, runs.text()
    (folder,) = runs.folders()
    runs.words = [str(sample_root), "--gpu=-1", "-j=0", f"--resume={folder}", "--lr=0.01"]
    assert runs.run() == 0, runs.text()
    assert "Changed for this run: lr from 0.02 to 0.01." in runs.text()
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["lr"] == 0.01 and config["arguments"]["epochs"] == 3
    assert config["history"][1]["changed"] == {"lr": [0.02, 0.01]}


def test_a_request_to_stop_ends_the_validation(sample_root, tmp_path, whole):
    """Stop at once, for machines that shut down in 30 seconds; the validation is repeated later."""
    runs = Runs(sample_root, tmp_path, VARIANTS["no worker"])
    assert runs.run(kill=("trainer", "evaluate", 1, signal.SIGTERM)) == 143, runs.text()
    (folder,) = runs.folders()
    last = folder / "models" / checkpoint.LAST
    content = checkpoint.load(last)
    assert content["progress"]["position"] == 2
    assert f"--resume={os.path.relpath(last, CODE)}" in runs.text()
    content["progress"]["seconds"] += 1000
    torch.save(content, last)
    assert runs.run(f"--resume={last}") == 0, runs.text()
    assert final_state(folder) == whole("no worker")
    rows = (json.loads(line) for line in (folder / "metrics.jsonl").open())
    assert [row["seconds"] > 1000 for row in rows][:3] == [False, True, False]


def test_resume_auto_takes_the_newest_good_checkpoint_of_the_newest_run(
    sample_root, tmp_path, whole
):
    runs = Runs(sample_root, tmp_path, VARIANTS["no worker"])
    assert runs.run("--resume=auto", kill=("file", "_link", 2)) == -signal.SIGKILL
    [folder] = runs.folders()
    older = folder.with_name("torch_conv_exp_2000-01-01_00-00-00")
    evaluation = folder.with_name("evaluation_exp_2099-01-01_00-00-00")
    for decoy in (older, evaluation):
        (decoy / "models").mkdir(parents=True)
    models = folder / "models"
    (models / checkpoint.LAST).write_bytes(b"damaged")
    assert runs.run("--resume=auto") == 0, runs.text()
    assert f"Loaded {os.path.relpath(models / checkpoint.PREVIOUS, CODE)}" in runs.text()
    assert final_state(folder) == whole("no worker")

    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert runs.run("--resume=auto") == 0
    assert runs.text().endswith("This run has done 3 epochs: raise --epochs to train further.\n")
    assert before == {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc whether a process has stopped")
def test_two_processes_do_not_write_to_one_run(sample_root, tmp_path, whole):
    """The second is refused as long as the first one lives, even if that does nothing."""
    runs = Runs(sample_root, tmp_path, VARIANTS["2 workers"])
    first = runs.start(kill=("logger", "log_epoch", 1, signal.SIGSTOP))
    status = Path(f"/proc/{first.pid}/stat")
    while status.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.05)
    before = final_state(runs.folders()[0])
    assert runs.run("--resume=auto") == 1
    assert re.search(r"^error: another process writes to \S+: wait for it", runs.text(), re.M)
    assert final_state(runs.folders()[0]) == before
    first.kill()  # its workers live on for some seconds
    first.join()
    assert runs.run("--resume=auto") == 0, runs.text()
    assert final_state(runs.folders()[0]) == whole("2 workers")


def test_resume_auto_starts_afresh_where_there_is_nothing(sample_root, tmp_path):
    runs = Runs(sample_root, tmp_path, ["-j=0"])
    folder = runs.logs / "torch_conv_exp_2000-01-01_00-00-00"
    (folder / "models").mkdir(parents=True)
    assert runs.run("--resume=auto", "--epochs=1") == 0, runs.text()
    path = os.path.relpath(folder, CODE)
    assert f"--resume=auto: {path} holds no checkpoint; starting a new run" in runs.text()
    assert len(runs.folders()) == 2 and len(list(folder.rglob("*"))) == 1
    assert runs.run("--resume=auto", "-e") == 0, runs.text()
    assert runs.run("--resume=auto", "-e", "--use-vit") == 1
    assert runs.text().endswith("no run to look at\n")


def test_an_epoch_under_way_starts_over_in_another_order(sample_root, tmp_path):
    runs = Runs(sample_root, tmp_path, ["-j=0"])
    assert runs.run(kill=("file", "_link", 3)) == -signal.SIGKILL
    assert runs.run("--resume=auto", "-b=16", "--seed=1") == 0, runs.text()
    line = (
        "Resuming: the file was saved in mid-epoch with other -b and --seed: epoch 2 starts over."
    )
    assert line in runs.text() and "Epoch: [2][0/5]" in runs.text()
    steps = [step for step, _ in points(runs.folders()[0])["data/training_loss"]]
    assert steps == list(range(len(steps))) and len(steps) == 3 + 2 * 5  # no point vanished


def test_a_second_interrupt_stops_at_once(sample_root, tmp_path, whole):
    runs = Runs(sample_root, tmp_path, VARIANTS["2 workers"])
    twice = ("trainer", "evaluate", 1, signal.SIGINT, signal.SIGINT)
    assert runs.run(kill=twice) == 130, runs.text()
    assert runs.text().endswith("Stopped at once; saved files are intact.\n")
    assert runs.run("--resume=auto") == 0, runs.text()
    assert final_state(runs.folders()[0]) == whole("2 workers")


@pytest.mark.parametrize("hours", [-1, 0, 1])
def test_points_are_purged_on_a_machine_whose_clock_is_wrong(tmp_path, monkeypatch, hours):
    """A run cut after step 5 resumes at step 3, on another machine."""
    for first, begun in ((0, 1e9), (3, 1e9 + 3600 * hours)):
        monkeypatch.setattr(event_file, "time", SimpleNamespace(time=lambda begun=begun: begun))
        file = event_file.EventFile(tmp_path, first or None)
        for step in range(first, 6):
            file.scalar("loss", first, step)
        file.close()
    assert points(tmp_path) == {"loss": [(0, 0), (1, 0), (2, 0), (3, 3), (4, 3), (5, 3)]}
