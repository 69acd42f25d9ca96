"""The GPU check in its small mode, on the CPU: its parts, their verdicts and limits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # its scripts import so

import gpu_check  # noqa: E402
import gpu_parts  # noqa: E402


def test_every_part_has_a_limit():
    assert gpu_check.LIMITS.keys() | gpu_check.NAMED_ONLY.keys() == gpu_parts.PARTS.keys()
    assert gpu_check.LIMITS.keys() >= gpu_check.SLOW


@pytest.mark.parametrize("part", ["convolution", "cache", "profile", "out_of_memory", "attacks"])
def test_a_part_finds_nothing_wrong_in_small_mode(sample_root, tmp_path, part):
    """In this process. `resume` is below; the others start a training, or need a GPU."""
    words = [part, str(tmp_path / "found.json"), str(sample_root), "--small"]
    gpu_parts.run(["gpu_parts.py", *words])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ok"], found["verdict"]


def test_each_part_is_judged_and_both_files_are_written(sample_root, tmp_path, capsys):
    parts = ["versions", "parity"]
    words = ["--small", f"--parts={','.join(parts)}", f"--out={tmp_path}"]
    assert gpu_check.main(["gpu_check.py", str(sample_root), *words]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ok")]
    assert [line.split()[1] for line in lines] == parts
    record = json.loads(next(tmp_path.glob("gpu_*.json")).read_text())
    assert list(record["parts"]) == parts and record["commit"]
    assert record["parts"]["parity"]["relative_errors"]["custom_conv bf16"][0] > 1e-4
    table = next(tmp_path.glob("gpu_*.md")).read_text()
    assert all(f"| {part} | ok |" in table for part in parts)


def test_a_killed_and_resumed_run_is_compared(sample_root, tmp_path, capsys):
    words = ["--small", "--parts=resume", f"--out={tmp_path}"]
    assert gpu_check.main(["gpu_check.py", str(sample_root), *words]) == 0
    assert "killed and resumed: the same bits" in capsys.readouterr().out


def test_a_part_that_takes_too_long_or_fails_is_a_finding(sample_root, tmp_path):
    found = gpu_check.run_part("parity", sample_root, limit=0.2, small=True)
    assert not found["ok"] and found["verdict"] == "not done within 0.2 s"
    found = gpu_check.run_part("cache", tmp_path / "nowhere", limit=100, small=True)
    assert not found["ok"] and found["verdict"].startswith("FileNotFoundError")


def test_an_unknown_part_is_refused(sample_root, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["gpu_check.py", str(sample_root), "--parts=speeed"])
    assert "no part speeed" in capsys.readouterr().err
