"""colab.ipynb, run from top to bottom on drawn images."""

import os
import shutil
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs pip install nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="needs pip install nbclient ipykernel")
pytest.importorskip("ipykernel", reason="needs pip install nbclient ipykernel")

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = "colab"  # the tag of cells that need a GPU, a network or an address to clone
STOP = """
import os, signal
from tensorboard import manager
servers = [info.pid for info in manager.get_all()]
for pid in servers:
    os.kill(pid, signal.SIGTERM)
print(len(servers), "stopped")
"""


def outputs(cell) -> str:
    """The text of a cell's outputs."""
    return "".join(o.get("text", "") or str(o.get("data", "")) for o in cell.outputs)


@pytest.fixture
def tree(tmp_path):
    """A copy of code/, so that the runs are not written to this project's logs/."""
    shutil.copytree(ROOT / "code", tmp_path / "code", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_notebook_trains_attacks_and_shows_tensorboard(tree, sample_root, monkeypatch):
    notebook = nbformat.read(ROOT / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[1].source.startswith('REPOSITORY = "https://')
    cells = [c for c in notebook.cells if SKIPPED not in c.metadata.get("tags", [])]
    assert len(notebook.cells) - len(cells) == 4
    values = f"DATA, FLAGS = {str(sample_root)!r}, '--gpu=-1 -j 0 -b 16'"
    cells.insert(2, nbformat.v4.new_code_cell(values))
    cells.append(nbformat.v4.new_code_cell(STOP))
    notebook.cells = cells
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tree))  # where TensorBoard lists its servers
    nbclient.NotebookClient(notebook, timeout=300).execute(cwd=str(tree / "code"))
    train, evaluate, attack, tensorboard, stop = [c for c in cells if c.cell_type == "code"][2:]
    for cell in (train, evaluate, attack):
        assert "******Acc@1" in outputs(cell), outputs(cell)
    assert "tensorboard" in outputs(tensorboard) and outputs(stop) == "1 stopped\n"
    (run,) = (tree / "logs").iterdir()
    assert (run / "models" / "model_best.pth.tar").exists()
