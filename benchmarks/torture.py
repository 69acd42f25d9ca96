"""Kill real training runs at random moments, resume them, compare their ends bit by bit.

    python benchmarks/torture.py --kills 50

Each run is `python main.py ... --resume=auto`, killed by SIGKILL one to four times (half of the
times as soon as a checkpoint is being written) and then left to finish. Weights, optimizer,
schedule, best checkpoint, metrics rows and TensorBoard points must equal those of a run that was
never killed. Writes results/reliability.md; ends with 1 if any run ended differently.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from results_file import ROOT, provenance, write_section
from run_state import final_state

COMMON = ["--gpu=-1", "-b=16", "--epochs=3", "--warmup=1", "-p=2", "--save-every=2"]
VARIANTS = {
    "SimpleNet, no worker": ["--lr=0.02", "-j=0"],
    "SimpleNet, 1 worker": ["--lr=0.02", "-j=1"],
    "SimpleNet, 2 workers": ["--lr=0.02", "-j=2"],
    "adversarial, 1 worker": ["--lr=0.02", "-j=1", "--pgd"],
    "SimpleViT with drop path, 2 workers": ["--lr=0.001", "-j=2", "--use-vit"],
}


class Tree:
    """A copy of code/ whose runs end up in logs/ beside it."""

    def __init__(self, folder: Path, data: Path, flags: list[str]) -> None:
        shutil.copytree(ROOT / "code", folder / "code")
        self.folder, self.output = folder, folder / "output.txt"
        self.command = [sys.executable, "main.py", str(data), *COMMON, *flags, "--resume=auto"]

    def start(self) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.output, "ab") as out:
            return subprocess.Popen(
                self.command, cwd=self.folder / "code", env=environment, stdout=out, stderr=out
            )

    def finish(self) -> None:
        """Run to the end.

        Raises:
            RuntimeError: the run failed; says what it printed last.
        """
        if code := self.start().wait():
            end = self.output.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"exit code {code}: {end}")

    def state(self) -> dict[str, object]:
        """The final state of the newest run."""
        runs = sorted((self.folder / "logs").glob("*_exp_*"), key=lambda f: f.name[-19:])
        return final_state(runs[-1])

    def writes(self) -> bool:
        return any((self.folder / "logs").glob("*/models/*.part"))

    def kill(self, delay: float, while_writing: bool) -> str | None:
        """Start a run and kill it; tells at what, None if it ended before."""
        process = self.start()
        moment = time.monotonic() + delay
        while process.poll() is None:
            writing = while_writing and self.writes()
            if time.monotonic() >= moment and (writing or not while_writing):
                process.send_signal(signal.SIGKILL)
                process.wait()
                return "while writing" if self.writes() else "elsewhere"
            time.sleep(0.0005 if while_writing else 0.01)
        return None


def torment(tree: Tree, seconds: float, rng: random.Random, most: int) -> list[str]:
    """Kill a run up to `most` times, at random moments of its `seconds`; then let it finish."""
    kills = []
    for _ in range(rng.randint(1, most)):
        while_writing = rng.random() < 0.5
        delay = rng.uniform(0, seconds * (0.5 if while_writing else 1))
        if (moment := tree.kill(delay, while_writing)) is None:
            break
        kills.append(moment)
    tree.finish()
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    moments, different, runs = Counter(), [], Counter()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        data = scratch / "scenes"
        draw = [sys.executable, "make_sample_data.py", str(data), "--train", "8", "--val", "4"]
        subprocess.run(draw, cwd=ROOT / "code", check=True)
        whole = {}  # variant: (state, seconds) of a run that nobody killed
        while moments.total() < args.kills:
            variant = list(VARIANTS)[runs.total() % len(VARIANTS)]
            if variant not in whole:
                tree = Tree(scratch / f"whole {variant}", data, VARIANTS[variant])
                start = time.monotonic()
                tree.finish()
                whole[variant] = tree.state(), time.monotonic() - start
            tree = Tree(scratch / f"{runs.total()}", data, VARIANTS[variant])
            kills = torment(tree, whole[variant][1], rng, min(4, args.kills - moments.total()))
            state = tree.state()
            wrong = [key for key, value in whole[variant][0].items() if state[key] != value]
            runs[variant] += 1
            moments.update(kills)
            different += [f"{variant}: {', '.join(wrong)} differ"] if wrong else []
            end = f"DIFFERENT: {', '.join(wrong)}" if wrong else "identical"
            print(f"{moments.total():3} kills, {variant}, killed {kills}: {end}", flush=True)
            shutil.rmtree(tree.folder)
    tell(runs, moments, different, time.monotonic() - begun)
    return 1 if different else 0


def tell(runs: Counter, moments: Counter, different: list[str], seconds: float) -> None:
    lines = [
        f"{runs.total() - len(different)} of {runs.total()} runs, killed {moments.total()} times "
        f"in all ({moments['while writing']} of them while a file was being written), ended with "
        "the bits of the run that was never killed: weights, optimizer, schedule, best "
        "checkpoint, metrics rows, TensorBoard points.",
        "",
        "| runs | variant |",
        "|---|---|",
        *(f"| {n} | {variant} |" for variant, n in runs.items()),
        "",
        *(f"- DIFFERENT: {line}" for line in different),
        f"{provenance()} {seconds:.0f} s.",
    ]
    write_section("reliability.md", "Runs killed and resumed", "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
