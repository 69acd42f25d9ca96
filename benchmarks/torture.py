"""Kill training runs at random moments, resume them, compare their final states bit by bit.

    python benchmarks/torture.py --kills 50 --start-method forkserver

Each run is `python main.py ... --resume=auto`. It is stopped one to four times, by SIGKILL (in half
of the cases while a checkpoint is being written), SIGTERM or SIGINT, and then runs to its end.
Weights, optimizer, schedule, best checkpoint, metrics rows and TensorBoard points must equal those
of an uninterrupted run. Writes results/reliability.md; exits with 1 if any run differs.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from results_file import ROOT, origin, origin_line, write_section
from run_state import final_state

from deepvision.config import OneLineParser
from deepvision.runtime.provenance import command_line

COMMON = ["--gpu=-1", "-b=16", "--epochs=3", "--warmup=1", "--lr=0.02", "-p=2", "--save-every=2"]
VARIANTS = {
    "SimpleNet, no worker": ["-j=0"],
    "SimpleNet, 1 worker": ["-j=1"],
    "SimpleNet, 2 workers, --cache=disk": ["-j=2", "--cache=disk"],
    "SimpleNet in bfloat16, 1 worker, --cache=ram": ["-j=1", "--amp=bf16", "--cache=ram"],
    "SimpleNet on CustomConv2d, 2 workers": ["-j=2", "--use-custom-conv"],
    "adversarial (pgd), 1 worker": ["-j=1", "--pgd"],
    "adversarial (free), no worker": ["-j=0", "--at=free", "--best-by=robust"],
    "SimpleViT with stochastic depth, 2 workers": ["-j=2", "--use-vit", "--lr=0.001"],
    "SceneNet with EMA, 1 worker": ["-j=1", "--use-scene-net"],
}
SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT]


class Tree:
    """A copy of code/, whose runs are in logs/ in the same folder."""

    def __init__(self, folder: Path, data: Path, flags: list[str], method: str) -> None:
        shutil.copytree(ROOT / "code", folder / "code")
        start = f"import multiprocessing; multiprocessing.set_start_method({method!r})\n"
        (folder / "sitecustomize.py").write_text(start)  # Python imports it first of all
        self.folder, self.output = folder, folder / "output.txt"
        self.command = [sys.executable, "main.py", str(data), *COMMON, *flags, "--resume=auto"]

    def start(self) -> subprocess.Popen:
        """Start or resume the run."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.folder)}
        with open(self.output, "ab") as out:
            return subprocess.Popen(
                self.command,
                cwd=self.folder / "code",
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,  # a process group: signals can reach its workers too
            )

    def finish(self) -> dict[str, object]:
        """Run to the end; return the final state of the newest run.

        Raises:
            RuntimeError: the run failed; the message is the end of its output.
        """
        self.wait(self.start(), 0)
        runs = sorted((self.folder / "logs").glob("*_exp_*"), key=lambda f: f.name[-19:])
        return final_state(runs[-1])

    def wait(self, process: subprocess.Popen, *codes: int) -> None:
        """Wait for the run to end.

        Raises:
            RuntimeError: its exit code is not one of `codes`.
        """
        if process.wait(600) not in codes:
            end = self.output.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"exit code {process.returncode}: {end}")

    def is_writing(self) -> bool:
        """Return True while a checkpoint is being written."""
        return any((self.folder / "logs").glob("*/models/*.part"))

    def interrupt(self, number: signal.Signals, delay: float, while_writing: bool) -> str | None:
        """Start a run and send it a signal; return its name, or None if the run ended before.

        SIGKILL goes to the trainer only. The others go to its workers too, as from a terminal or a
        cluster; they may arrive before the run handles signals or after its last step.

        Raises:
            RuntimeError: the run ended neither by the signal nor by stopping as requested.
        """
        process = self.start()
        moment = time.monotonic() + delay
        while process.poll() is None:
            writing = while_writing and self.is_writing()
            if time.monotonic() >= moment and (writing or not while_writing):
                os.kill(process.pid if number == signal.SIGKILL else -process.pid, number)
                self.wait(process, -number, 128 + number, 0)
                partial = number == signal.SIGKILL and self.is_writing()
                return f"{number.name} while writing" if partial else number.name
            time.sleep(0.0005 if while_writing else 0.01)
        return None


def interrupt_repeatedly(tree: Tree, seconds: float, rng: random.Random) -> list[str]:
    """Interrupt a run one to four times, at random moments of its `seconds`; the signals' names."""
    signals = []
    for _ in range(rng.randint(1, 4)):
        while_writing = rng.random() < 0.5
        delay = rng.uniform(0, seconds * (0.5 if while_writing else 1))
        name = tree.interrupt(rng.choice(SIGNALS), delay, while_writing)
        if name is None:
            break
        signals.append(name)
    return signals


def differences(tree: Tree, expected: dict[str, object]) -> str:
    """Run to the end; name the parts of the final state that differ from `expected`, '' if none."""
    try:
        state = tree.finish()
    except RuntimeError as e:
        return str(e)
    return ", ".join(key for key, value in expected.items() if state[key] != value)


class Campaign:
    """Interrupted runs of all variants in turn, and their outcomes.

    method: how workers start; signals: how often each signal was sent; different: one line for
    each run that differs.
    """

    def __init__(self, scratch: Path, seed: int, method: str) -> None:
        self.scratch, self.rng, self.start = scratch, random.Random(seed), time.monotonic()
        self.method = method
        self.signals, self.runs, self.different = Counter(), Counter(), []
        self.uninterrupted = {}  # variant -> (final state, seconds)
        self.data = scratch / "scenes"
        draw = [sys.executable, "make_sample_data.py", self.data, "--train", "8", "--val", "4"]
        subprocess.run(draw, cwd=ROOT / "code", check=True)

    def kills(self) -> int:
        """How often SIGKILL was sent."""
        return sum(n for name, n in self.signals.items() if name.startswith("SIGKILL"))

    def tree(self, name: str, variant: str) -> Tree:
        """A tree for runs of the variant."""
        return Tree(self.scratch / name, self.data, VARIANTS[variant], self.method)

    def run_next(self) -> None:
        """Interrupt one run, let it finish, compare."""
        variant = list(VARIANTS)[self.runs.total() % len(VARIANTS)]
        state, seconds = self.expected(variant)
        for cache in self.data.glob("*.decoded*"):
            cache.unlink()  # so that it is built again, and interrupted meanwhile
        tree = self.tree(f"{self.runs.total()}", variant)
        signals = interrupt_repeatedly(tree, seconds, self.rng)
        wrong = differences(tree, state)
        self.runs[variant] += 1
        self.signals.update(signals)
        self.different += [f"{variant}: {wrong}"] if wrong else []
        outcome = f"DIFFERENT: {wrong}" if wrong else "identical"
        print(f"{self.kills():3} kills, {variant}, {signals}: {outcome}", flush=True)
        shutil.rmtree(tree.folder)

    def expected(self, variant: str) -> tuple[dict[str, object], float]:
        """The final state and the seconds of an uninterrupted run."""
        if variant not in self.uninterrupted:
            tree = self.tree(f"uninterrupted {variant}", variant)
            start = time.monotonic()
            self.uninterrupted[variant] = tree.finish(), time.monotonic() - start
        return self.uninterrupted[variant]

    def write_results(self, command: str) -> None:
        """Write the section of results/reliability.md."""
        runs, signals, kills = self.runs.total(), self.signals, self.kills()
        lines = [
            f"{runs - len(self.different)} of {runs} runs, killed {kills} times in all "
            f"({signals['SIGKILL while writing']} of them while a checkpoint was being written) "
            f"and stopped {signals.total() - kills} times (SIGTERM {signals['SIGTERM']}, "
            f"SIGINT {signals['SIGINT']}), ended bit by bit like an uninterrupted run: "
            "weights, optimizer, schedule, best checkpoint, metrics rows, TensorBoard points.",
            "",
            "| runs | variant |",
            "|---|---|",
            *(f"| {n} | {variant} |" for variant, n in self.runs.items()),
            "",
            *(f"- DIFFERENT: {line}" for line in self.different),
            f"{origin_line(origin(command))} {time.monotonic() - self.start:.0f} s.",
        ]
        title = f"Runs killed and resumed, with workers started by {self.method}"
        write_section("reliability.md", title, "\n".join(lines))


def main(argv: Sequence[str]) -> int:
    """Interrupt runs and write the section; return 1 if any run differs."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    methods = multiprocessing.get_all_start_methods()
    parser.add_argument(
        "--start-method", choices=methods, default=methods[0], help="of loader processes"
    )
    args = parser.parse_args(argv[1:])
    with tempfile.TemporaryDirectory() as scratch:
        campaign = Campaign(Path(scratch), args.seed, args.start_method)
        while campaign.kills() < args.kills:
            campaign.run_next()
    campaign.write_results(command_line(argv))
    return 1 if campaign.different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
