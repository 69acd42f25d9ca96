"""Freed memory is used again by the next step, and given back before workers are forked."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from deepvision.runtime import memory

CODE = Path(memory.__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's memory is looked after"
)

COMMON = """
import resource
import torch

BYTES = 2**26

def touch():
    for _ in range(10):  # a small block may come to lie where a large one was freed
        torch.empty(BYTES, dtype=torch.uint8).fill_(1)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
"""


def run(script):
    words = [sys.executable, "-c", COMMON + script]
    return subprocess.run(words, cwd=CODE, capture_output=True, text=True, check=True).stdout


def share_of_new_pages(before):
    """Among those that are written to, where as much has been freed."""
    return float(
        run(f"""
{before}
touch()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
print(faults * resource.getpagesize() / (10 * BYTES))
""")
    )


CONFIGURE = """
from deepvision.runtime.device import configure_backend
configure_backend(torch.device('cpu'))
"""


def test_training_on_the_cpu_reuses_freed_memory():
    assert share_of_new_pages(CONFIGURE) < 0.01
    assert share_of_new_pages("") > 0.5  # or there is nothing that needs looking after


FORK = """
import multiprocessing
from deepvision.runtime import memory
from deepvision.data.loader import SeededLoader

class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, index): return torch.zeros(1), index

multiprocessing.set_start_method("fork", force=True)
memory.retain_freed_memory()
batches = SeededLoader(Numbers(), [[(0, 0)], [(0, 1)]], 0, workers={workers})
for _ in range(2):
    touch()
    kept = resident()
    assert len(list(batches)) == 2
    print(kept - resident() > 0.9 * BYTES)
"""


@pytest.mark.parametrize(("workers", "given_back"), [(1, ["True", "False"]), (0, ["False"] * 2)])
def test_only_a_loader_about_to_fork_gives_freed_memory_back(workers, given_back):
    assert run(FORK.format(workers=workers)).split() == given_back
