"""Where a result comes from: command, commit, device, library versions, date."""

from __future__ import annotations

import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from deepvision.runtime.device import device_name

ROOT = Path(__file__).resolve().parents[3]


def commit() -> str | None:
    """The commit of this checkout, with a + if files have changed since; None outside git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line(argv: Sequence[str]) -> str:
    """`python SCRIPT WORDS`; absolute paths, which only this machine knows, lose their folders."""
    script = Path(argv[0])
    folder = "" if script.parent.name in ("", "code") else f"{script.parent.name}/"
    words = ("=".join(map(strip_folder, word.split("="))) for word in argv[1:])
    return shlex.join(["python", f"{folder}{script.name}", *words])


def strip_folder(text: str) -> str:
    """The last part of an absolute path; any other text as it is."""
    return Path(text).name if Path(text).is_absolute() else text


def provenance(device: torch.device, command: str) -> dict:
    """The record that config.json, result files and reports share."""
    return {
        "command": command,
        "commit": commit(),
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
    }
