"""Write results and their provenance to results/; importing this module makes code/ importable."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT / "code"))

from deepvision.runtime.matmul import onednn_is_right, read_facts  # noqa: E402
from deepvision.runtime.provenance import provenance  # noqa: E402


def write_section(name: str, title: str, text: str) -> None:
    """Write `text` under the heading `title` of results/`name`; other sections stay as they are."""
    path = RESULTS / name
    path.parent.mkdir(exist_ok=True)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    section = f"## {title}\n\n{text.strip()}\n\n"
    pattern = rf"^## {re.escape(title)}\n.*?(?=^## |\Z)"
    new, replaced = re.subn(pattern, lambda _: section, old, flags=re.M | re.S)
    if not replaced:
        new = f"{old.rstrip()}\n\n{section}".lstrip()
    path.write_text(new.rstrip() + "\n", encoding="utf-8")


def origin(command: str, device: str = "cpu", **versions: str) -> dict:
    """The provenance of a result, with the CPU's model, the library of our float32 products on it,
    and the versions of other libraries."""
    products = "oneDNN" if onednn_is_right(read_facts()) else "torch's default"
    cpu = {"processor": cpu_model(), "float32 products": products}
    return provenance(torch.device(device), command) | cpu | versions


def origin_line(record: dict) -> str:
    """An `origin` as one line of Markdown; its other keys are not printed."""
    known = ("commit", "processor", "float32 products", "torch", "python", "opencv", "numpy")
    named = ", ".join(f"{key} {record[key]}" for key in known if record.get(key))
    return f"`{record['command']}`, {named}, {record['device']}, {record['date']}."


def cpu_model() -> str:
    """The model of the CPU, where the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return models[0] if models else platform.processor()
