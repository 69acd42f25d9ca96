"""Find out in minutes whether everything works on this GPU, and how fast it is.

    make gpu-check DATA=../data        all parts, then the goals and the test suite
    make gpu-robust DATA=../data       robust CIFAR-10 (DATA holds cifar10/)
    python benchmarks/gpu_check.py ../data --parts=parity,speed
    python benchmarks/gpu_check.py ../data --small        a few images on the CPU

The parts run in order of worth, each in a process with a time limit. A line of verdict follows each
at once, and results/gpu_<card>.{json,md} are written again, so that a check that is cut off still
says what it has found.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from results_file import RESULTS, origin, origin_line

from deepvision.config import OneLineParser
from deepvision.runtime.device import device_name
from deepvision.runtime.provenance import command_line

# Seconds that each part may take, in order of worth; the first twelve take about five minutes
LIMITS = {
    "versions": 60,
    "parity": 120,
    "convolution": 90,
    "resume": 150,
    "cache": 60,
    "speed": 240,
    "profile": 120,
    "synchronisations": 60,
    "processes": 90,
    "out_of_memory": 60,
    "attacks": 60,
    "compiled": 240,
    "goal_default": 400,
    "goal_bf16": 300,
    "goal_scene_net": 900,
    "tests": 3600,
}
NAMED_ONLY = {"robust": 1500}  # another data set
SLOW = {"goal_default", "goal_bf16", "goal_scene_net", "tests"}


def run_part(part: str, data: Path, limit: float, small: bool) -> dict:
    """What a part found, with its seconds; at the limit its processes are killed."""
    with tempfile.TemporaryDirectory() as folder:
        file, start = Path(folder) / "found.json", time.perf_counter()
        script = Path(__file__).with_name("gpu_parts.py")
        words = [sys.executable, str(script), part, str(file), str(data.resolve())]
        process = subprocess.Popen(
            [*words, *(["--small"] if small else [])], start_new_session=True
        )
        try:
            process.wait(limit)
            missing = f"ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            missing = f"not done within {limit:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = {"ok": False, "verdict": missing}
        if file.exists():
            found = json.loads(file.read_text())
        return found | {"seconds_of_part": round(time.perf_counter() - start, 1)}


def table(record: dict) -> str:
    """The verdicts in Markdown."""
    lines = [f"# GPU check: {record['device']}", "", "| part | | seconds | verdict |"]
    lines.append("|---|---|---:|---|")
    for name, found in record["parts"].items():
        mark = "ok" if found["ok"] else "**no**"
        lines.append(f"| {name} | {mark} | {found['seconds_of_part']:.0f} | {found['verdict']} |")
    return "\n".join([*lines, "", origin_line(record), ""])


def main(argv: Sequence[str]) -> int:
    """Run the parts; return 1 if one of them is not as it should be."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("data", type=Path, help="data folder; for robust: holds cifar10/")
    parser.add_argument("--parts", help="names with commas; default: all but robust")
    parser.add_argument("--small", action="store_true", help="a few images, on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args(argv[1:])
    slower = 4 if args.small else 1  # on a CPU with other work to do
    limits = {part: slower * limit for part, limit in (LIMITS | NAMED_ONLY).items()}
    parts = (
        args.parts.split(",")
        if args.parts
        else [p for p in LIMITS if not args.small or p not in SLOW]
    )
    if unknown := set(parts) - limits.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}: {', '.join(limits)}")
    on_gpu = torch.cuda.is_available() and not args.small
    device = device_name(torch.device("cuda", 0)) if on_gpu else "CPU"
    card = re.sub(r"\W+", "_", device.removeprefix("NVIDIA ")).lower()
    record = origin(command_line(argv), "cuda:0" if on_gpu else "cpu") | {"parts": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        found = record["parts"][part] = run_part(part, args.data, limits[part], args.small)
        mark = "ok" if found["ok"] else "NO"
        print(f"{mark}  {part} ({found['seconds_of_part']:.0f} s): {found['verdict']}", flush=True)
        (args.out / f"gpu_{card}.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / f"gpu_{card}.md").write_text(table(record), encoding="utf-8")
    return 0 if all(found["ok"] for found in record["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
