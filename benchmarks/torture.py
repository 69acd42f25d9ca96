"""Kill real training runs at random moments, resume them, compare their ends bit by bit.

    python benchmarks/torture.py --kills 50

Each run is `python main.py ... --resume=auto`, killed by SIGKILL one to four times (half of the
times as soon as a checkpoint is being written), now and then asked to stop by SIGTERM or SIGINT,
and then left to finish. Weights, optimizer, schedule, best checkpoint, metrics rows and
TensorBoard points must equal those of a run that was never killed. Writes results/reliability.md;
ends with 1 if any run ended differently.
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

COMMON = ["--gpu=-1", "-b=16", "--epochs=3", "--warmup=1", "--lr=0.02", "-p=2", "--save-every=2"]
VARIANTS = {
    "SimpleNet, no worker": ["-j=0"],
    "SimpleNet, 1 worker": ["-j=1"],
    "SimpleNet, 2 workers, images decoded to disk": ["-j=2", "--cache=disk"],
    "SimpleNet in bfloat16, 1 worker, images in RAM": ["-j=1", "--amp=bf16", "--cache=ram"],
    "our convolution, 2 workers": ["-j=2", "--use-custom-conv"],
    "adversarial (pgd), 1 worker": ["-j=1", "--pgd"],
    "adversarial (free), no worker": ["-j=0", "--at=free", "--best-by=robust"],
    "SimpleViT with drop path, 2 workers": ["-j=2", "--use-vit", "--lr=0.001"],
    "SceneNet with mean weights, 1 worker": ["-j=1", "--use-scene-net"],
}
SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT]


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
                self.command,
                cwd=self.folder / "code",
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,  # so that a signal can be sent to it and its workers
            )

    def finish(self) -> dict[str, object]:
        """Run to the end; what the newest run ends with.

        Raises:
            RuntimeError: the run failed; says what it printed last.
        """
        self.await_end(self.start(), 0)
        runs = sorted((self.folder / "logs").glob("*_exp_*"), key=lambda f: f.name[-19:])
        return final_state(runs[-1])

    def await_end(self, process: subprocess.Popen, *codes: int) -> None:
        if process.wait(600) not in codes:
            end = self.output.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"exit code {process.returncode}: {end}")

    def writes(self) -> bool:
        return any((self.folder / "logs").glob("*/models/*.part"))

    def strike(self, number: signal.Signals, delay: float, while_writing: bool) -> str | None:
        """Start a run and send it a signal; tells which and at what, None if it ended before.

        SIGKILL takes the trainer alone. The others reach its workers, too, as those of a terminal
        or a cluster do, and may come before the run listens or after its last step.

        Raises:
            RuntimeError: the run ended neither by the signal nor by obeying it.
        """
        process = self.start()
        moment = time.monotonic() + delay
        while process.poll() is None:
            writing = while_writing and self.writes()
            if time.monotonic() >= moment and (writing or not while_writing):
                os.kill(process.pid if number == signal.SIGKILL else -process.pid, number)
                self.await_end(process, -number, 128 + number, 0)
                found = number == signal.SIGKILL and self.writes()
                return f"{number.name} while writing" if found else number.name
            time.sleep(0.0005 if while_writing else 0.01)
        return None


def torment(tree: Tree, seconds: float, rng: random.Random) -> list[str]:
    """Strike a run one to four times, at random moments of its `seconds`."""
    strikes = []
    for _ in range(rng.randint(1, 4)):
        while_writing = rng.random() < 0.5
        delay = rng.uniform(0, seconds * (0.5 if while_writing else 1))
        if (strike := tree.strike(rng.choice(SIGNALS), delay, while_writing)) is None:
            break
        strikes.append(strike)
    return strikes


def differences(tree: Tree, whole: dict[str, object]) -> str:
    """Let a run finish; what of its end is not as in `whole`, '' where all of it is."""
    try:
        state = tree.finish()
    except RuntimeError as e:
        return str(e)
    return ", ".join(key for key, value in whole.items() if state[key] != value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    strikes, different, runs = Counter(), [], Counter()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        data = scratch / "scenes"
        draw = [sys.executable, "make_sample_data.py", str(data), "--train", "8", "--val", "4"]
        subprocess.run(draw, cwd=ROOT / "code", check=True)
        whole = {}  # variant: (state, seconds) of a run that nobody killed
        while kills(strikes) < args.kills:
            variant = list(VARIANTS)[runs.total() % len(VARIANTS)]
            if variant not in whole:
                tree = Tree(scratch / f"whole {variant}", data, VARIANTS[variant])
                start = time.monotonic()
                whole[variant] = tree.finish(), time.monotonic() - start
            for decoded in data.glob("*.decoded*"):
                decoded.unlink()  # so that it is made again, and killed while it is made
            tree = Tree(scratch / f"{runs.total()}", data, VARIANTS[variant])
            struck = torment(tree, whole[variant][1], rng)
            wrong = differences(tree, whole[variant][0])
            runs[variant] += 1
            strikes.update(struck)
            different += [f"{variant}: {wrong}"] if wrong else []
            end = f"DIFFERENT: {wrong}" if wrong else "identical"
            print(f"{kills(strikes):3} kills, {variant}, {struck}: {end}", flush=True)
            shutil.rmtree(tree.folder)
    tell(runs, strikes, different, time.monotonic() - begun)
    return 1 if different else 0


def kills(strikes: Counter) -> int:
    return sum(n for name, n in strikes.items() if name.startswith("SIGKILL"))


def tell(runs: Counter, strikes: Counter, different: list[str], seconds: float) -> None:
    lines = [
        f"{runs.total() - len(different)} of {runs.total()} runs, killed {kills(strikes)} times in "
        f"all ({strikes['SIGKILL while writing']} of them while a checkpoint was being written) "
        f"and asked to stop {strikes.total() - kills(strikes)} times (SIGTERM {strikes['SIGTERM']},"
        f" SIGINT {strikes['SIGINT']}), ended with the bits of the run that was never touched: "
        "weights, optimizer, schedule, best checkpoint, metrics rows, TensorBoard points.",
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
