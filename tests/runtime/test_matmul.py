"""oneDNN computes float32 products where it is faster and as precise, and nowhere else."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepvision.runtime import matmul
from deepvision.runtime.matmul import Facts, configure_matmul, onednn_is_right, read_facts

CODE = Path(matmul.__file__).resolve().parents[2]
ZEN_5 = Facts("AuthenticAMD", frozenset({"avx2", "avx512f"}), "2.6.0+cpu", "highest", 9e-7)


@pytest.mark.parametrize(
    "change, right",
    [
        ({}, True),
        ({"torch_version": "2.14.1"}, True),
        ({"torch_version": "2.5.1"}, False),
        ({"vendor": "GenuineIntel"}, False),
        ({"vendor": ""}, False),  # ARM, macOS, Windows
        ({"flags": frozenset({"avx2"})}, False),
        ({"flags": ZEN_5.flags | {"amx_bf16"}}, False),
        ({"precision": "high"}, False),  # the user's
        ({"precision": "medium"}, False),
        ({"error": 2e-3}, False),  # bfloat16
        ({"error": float("nan")}, False),
    ],
)
def test_the_rule(change, right):
    assert onednn_is_right(replace(ZEN_5, **change)) is right


def test_reading_the_facts_changes_nothing():
    state, before = torch.get_rng_state(), torch.get_float32_matmul_precision()
    assert read_facts() == read_facts()
    assert torch.get_float32_matmul_precision() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_run_reports_a_cpu_without_its_library(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(matmul, "CPU_INFO", tmp_path / "missing")
    configure_matmul("highest")
    configure_matmul()
    assert not capsys.readouterr().out
    configure_matmul("medium")
    assert "oneDNN" in capsys.readouterr().out
    assert torch.get_float32_matmul_precision() == "highest"


LOSSES = """
import json, sys
from pathlib import Path
import torch
from torch.nn.functional import cross_entropy
from deepvision.runtime import matmul
from student_code import CustomConv2d, SimpleNet, SimpleViT

matmul.CPU_INFO = Path(sys.argv[1])
torch.set_num_threads(1)
networks = SimpleNet(CustomConv2d, 10), SimpleViT(img_size=64, depth=2, num_classes=10)
start = [{k: v.clone() for k, v in net.state_dict().items()} for net in networks]
found = {}
for recorded in ("highest", "medium"):
    matmul.configure_matmul(recorded)
    losses = found[torch.get_float32_matmul_precision()] = []
    for network, weights in zip(networks, start):
        network.load_state_dict(weights)
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(network.parameters(), 0.001, momentum=0.9)  # as in warmup
        for _ in range(20):
            x, y = torch.randn(4, 3, 64, 64), torch.randint(10, (4,))
            loss = cross_entropy(network(x.to(memory_format=torch.channels_last)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 only")
def test_losses_are_those_of_float32(tmp_path):
    """oneDNN without AMX's bfloat16, as on the AMD processor that the file describes."""
    (tmp_path / "cpuinfo").write_text("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f\n")
    done = subprocess.run(
        [sys.executable, "-c", LOSSES, str(tmp_path / "cpuinfo")],
        cwd=CODE,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found["medium"] != found["highest"]
    assert found["medium"] == pytest.approx(found["highest"], rel=1e-5)
