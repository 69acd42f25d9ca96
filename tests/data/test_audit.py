"""--check-data and --skip-bad-images: what is found in a damaged data folder."""

from __future__ import annotations

import multiprocessing
import shutil

import pytest

import utils
from custom_dataloader import MiniPlacesLoader
from deepvision.data import audit


@pytest.fixture
def root(sample_root, tmp_path):
    return shutil.copytree(sample_root, tmp_path / "data")


def damage(path):
    """Zeros amid a JPEG: it decodes, to another picture."""
    jpeg = bytearray(path.read_bytes())
    jpeg[-400:-200] = bytes(200)
    path.write_bytes(jpeg)


def problems(root, capsys, workers=0):
    code = audit.check(root, workers)
    lines = capsys.readouterr().out.splitlines()
    found = [line.removeprefix("problem: ") for line in lines if line.startswith("problem: ")]
    assert code == bool(found)
    plural = "s" * (len(found) > 1)
    assert lines[-1] == (f"{len(found)} problem{plural}" if found else "No problems found.")
    return found


def test_a_good_folder_has_no_problems(root, capsys):
    assert problems(root, capsys) == []


@pytest.mark.skipif(utils.simplejpeg is None, reason="only simplejpeg reports damage")
def test_the_audit_finds_what_is_wrong(root, capsys):
    names = MiniPlacesLoader(root).paths
    val = MiniPlacesLoader(root, split="val").paths
    images = root / "images"
    (images / names[1]).unlink()
    damage(images / names[2])
    shutil.copy(images / names[3], images / val[0])
    with open(root / "train.txt", "a") as file:
        file.write("train/z/new/1.jpg 12\n")
    found = problems(root, capsys)
    assert found[:5] == [
        "class 10 has no images in train.txt",
        "class 11 has no images in train.txt",
        "class 10 has no images in val.txt",
        "class 11 has no images in val.txt",
        "class 12 has no images in val.txt",
    ]
    assert found[5] == f"cannot read the image {images / names[1]}: No such file or directory"
    assert found[6].startswith(f"the image {images / names[2]} is damaged: Corrupt JPEG data")
    assert found[7].endswith("train/z/new/1.jpg: No such file or directory")
    assert found[8] == f"{val[0]} of val.txt shows the same as {names[3]} of train.txt"
    assert len(found) == 9


def test_missing_files_are_problems(tmp_path, capsys):
    found = problems(tmp_path / "nowhere", capsys)
    assert len(found) == 2 and all(f"there is no folder {tmp_path}" in line for line in found)


@pytest.mark.skipif(utils.simplejpeg is None, reason="only simplejpeg reports damage")
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_unreadable_and_damaged_images_are_those_to_skip(root, method):
    dataset = MiniPlacesLoader(root)
    bad = [dataset.paths[5], dataset.paths[30]]
    (dataset.image_folder / bad[0]).write_bytes(b"")
    damage(dataset.image_folder / bad[1])
    previous = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        assert audit.unreadable([dataset], workers=1) == bad
    finally:
        multiprocessing.set_start_method(previous, force=True)
    dataset.skip(bad)
    assert dataset.skipped == bad and len(dataset) == 78
