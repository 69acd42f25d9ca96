"""Data that several tests share, made once per session and only when asked for."""

from __future__ import annotations

import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Tests run side by side, and a forked process would wait forever for its parent's other threads.
torch.set_num_threads(1)

# A shell starts background jobs with Ctrl-C ignored; the tests' processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# They wait for time limits and other processes, so they start first
LONGEST = ("test_grade.py", "test_distributed.py", "test_loader.py", "test_main.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def packs(tmp_path_factory) -> Path:
    """The folder that holds the unpacked real images: miniplaces10/, miniplaces100/, cifar10/."""
    archives = sorted((ROOT.parent / "shared" / "data").glob("*.tar.gz"))
    if not archives:
        pytest.skip("the packs of real images, ../shared/data, are not here")
    folder = tmp_path_factory.mktemp("packs")
    for archive in archives:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory) -> Path:
    """A small drawn data set in the official layout; read only, as all tests share it."""
    folder = tmp_path_factory.mktemp("sample") / "scenes"
    command = [sys.executable, "make_sample_data.py", str(folder), "--train", "8", "--val", "3"]
    subprocess.run(command, cwd=ROOT / "code", check=True, stdout=subprocess.DEVNULL)
    return folder
