"""The library that computes float32 matrix products on the CPU.

torch calls MKL, which runs AVX2 code on AMD processors: 95 GFLOP/s per thread of a Zen 5, where
oneDNN's AVX-512 code reaches 215-230. `torch.set_float32_matmul_precision("medium")` selects
oneDNN and permits bfloat16. oneDNN computes in bfloat16 where the processor multiplies it faster,
as with AMX and on ARM, and in float32 everywhere else.

The choice follows from facts alone: a time measured at the start would differ from run to run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

TORCH, ONEDNN = "highest", "medium"  # names of torch.set_float32_matmul_precision
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Facts:
    """What the choice depends on. vendor and flags are those of /proc/cpuinfo, '' elsewhere.

    precision: torch's setting, "highest" unless the user's code has changed it
    error: of a product by oneDNN, relative to its largest value
    """

    vendor: str
    flags: frozenset[str]
    torch_version: str
    precision: str
    error: float


def onednn_is_right(facts: Facts) -> bool:
    """Whether oneDNN is faster on this processor, and as precise as float32."""
    return (
        facts.vendor == "AuthenticAMD"
        and "avx512f" in facts.flags
        and not any(flag.startswith("amx") for flag in facts.flags)
        and tuple(map(int, facts.torch_version.split(".")[:2])) >= (2, 6)  # none older was measured
        and facts.precision == TORCH
        and facts.error < 1e-5  # bfloat16: 2e-3
    )


def read_facts() -> Facts:
    """The facts about this machine."""
    info = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    fields = dict(re.findall(r"^(\w+)\s*: (.*)$", info, re.MULTILINE))
    flags = frozenset(fields.get("flags", "").split())
    precision = torch.get_float32_matmul_precision()
    vendor = fields.get("vendor_id", "")
    return Facts(vendor, flags, torch.__version__, precision, onednn_error())


def onednn_error() -> float:
    """The largest error of a product (64, 64) @ (64, 64), relative to its largest value."""
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    exact, precision = a.double() @ b.double(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(ONEDNN)
        return ((a @ b - exact).abs().max() / exact.abs().max()).item()
    finally:
        torch.set_float32_matmul_precision(precision)


def configure_matmul(recorded: str | None = None) -> None:
    """Use oneDNN where it is right; a resumed run uses the library that it has `recorded`.

    Prints a line if this CPU cannot.
    """
    if recorded != TORCH and onednn_is_right(read_facts()):
        torch.set_float32_matmul_precision(ONEDNN)
    if recorded == ONEDNN and torch.get_float32_matmul_precision() != ONEDNN:
        print("This run's float32 products were oneDNN's; on this CPU they are not: bits differ.")
