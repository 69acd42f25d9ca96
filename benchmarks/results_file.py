"""Sections of results/*.md that programs write: each replaces its own and leaves the others."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))

from deepvision.runtime.run_logger import commit  # noqa: E402
from deepvision.training.engine import device_name  # noqa: E402


def write_section(name: str, title: str, text: str) -> None:
    """Put `text` under the heading `title` of results/`name`, at the end if it is new."""
    path = ROOT / "results" / name
    path.parent.mkdir(exist_ok=True)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    section = f"## {title}\n\n{text.strip()}\n\n"
    pattern = rf"^## {re.escape(title)}\n.*?(?=^## |\Z)"
    new, found = re.subn(pattern, lambda _: section, old, flags=re.M | re.S)
    if not found:
        new = f"{old.rstrip()}\n\n{section}".lstrip()
    path.write_text(new.rstrip() + "\n", encoding="utf-8")


def command() -> str:
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/" + Path(sys.argv[0]).name, *words])


def circumstances(device: str, **versions: str) -> dict:
    """Command, commit, date, device and versions of this run; `versions` of more libraries."""
    known = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "command": command(),
        "commit": commit() or "unknown",
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "device": device,
        "versions": known | versions,
    }


def told(result: dict) -> str:
    """`circumstances` as one line of Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    made = f"`{result['command']}`, commit {result['commit']}, {result['date']}, "
    return f"{made}{result['device']}; {versions}."


def provenance() -> str:
    """The same of a run on the CPU, at once."""
    return told(circumstances(device_name(torch.device("cpu"))))


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [s for s in info.read_text().splitlines() if "model name" in s] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()
