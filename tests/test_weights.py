"""Networks for anyone to load: found by name, looked at, refused for other categories."""

from __future__ import annotations

import hashlib
import json

import pytest

import main
from deepvision import checkpoint
from deepvision.models.registry import load_network
from deepvision.models.scene_net import Shape
from deepvision.runtime.run_dir import ROOT

NAMES = {"simplenet": "torch_conv", "simplevit": "vit", "scene_net": "scene_net"}


@pytest.mark.parametrize("name", NAMES)
def test_a_published_network_loads_and_is_what_the_table_says(name):
    path = ROOT / "results" / "weights" / f"{name}.pth.tar"
    model, kind = load_network(checkpoint.load(path), path, 100)
    assert kind == NAMES[name]
    if kind == "scene_net":
        assert model.shape == Shape()  # of files that record none
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in (path.parent / "README.md").read_text()


def test_the_files_stay_small():
    files = (ROOT / "results" / "weights").glob("*.pth.tar")
    assert sum(path.stat().st_size for path in files) <= 17e6


@pytest.fixture
def published(sample_root, tmp_path, monkeypatch):
    """A network of ten classes, published with the categories of the drawn images."""
    from custom_dataloader import MiniPlacesLoader
    from deepvision.models.registry import create_model

    names = list(MiniPlacesLoader(sample_root, num_classes=10).get_index_mapping().values())
    ckpt = {"state_dict": create_model("torch_conv", 10).state_dict(), "kind": "torch_conv"}
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    checkpoint.WEIGHTS.mkdir()

    def publish(categories: list[str] = names) -> None:
        checkpoint.save(checkpoint.WEIGHTS / "tiny.pth.tar", ckpt | {"categories": categories})

    publish()
    return publish


def run(sample_root, tmp_path, *words: str) -> int:
    return main.main([str(sample_root), "--gpu=-1", "-j=0", *words], tmp_path / "logs")


def test_an_evaluation_by_name_gets_a_new_run_folder(published, sample_root, tmp_path, capsys):
    assert run(sample_root, tmp_path, "--weights=tiny", "-e", "--views") == 0
    (folder,) = (tmp_path / "logs").iterdir()
    row = json.loads((folder / "evaluations.jsonl").read_text())
    assert row["checkpoint"] == "tiny.pth.tar" and row["images"] == 30
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"******Acc@1 {row['mirrored_top1']:.3f} Acc@5 {row['mirrored_top5']:.3f}"
    course = row["views"]["course's view"]
    assert course == [row["mirrored_top1"], row["mirrored_top5"]]


def test_a_run_starts_from_a_name(published, sample_root, tmp_path):
    assert run(sample_root, tmp_path, "--weights=tiny", "--epochs=1", "-b=16", "--lr=0") == 0
    (folder,) = (tmp_path / "logs").glob("torch_conv_exp_*")
    assert (folder / "models" / checkpoint.BEST).exists()


def test_other_categories_are_one_line(published, sample_root, tmp_path, capsys):
    published([f"other {k}" for k in range(10)])
    assert run(sample_root, tmp_path, "--weights=tiny", "-e") == 1
    error = capsys.readouterr().err
    assert "was trained on other categories than those of" in error and error.count("\n") == 1


def test_an_unknown_name_is_one_line(sample_root, tmp_path, capsys):
    assert run(sample_root, tmp_path, "--weights=resnet", "-e") == 1
    assert "no checkpoint at resnet" in capsys.readouterr().err
