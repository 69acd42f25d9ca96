"""The data set: samples, label files, class names."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_dataset import AUGMENT, VAL, make_root
from torch.utils.data import DataLoader

import custom_dataloader
from custom_dataloader import MiniPlacesLoader, count_classes, read_label_file
from utils import UserError, relpath, save_image

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path / "data", train=24, val=7)


def test_samples_labels_and_names(root):
    data = MiniPlacesLoader(root, num_classes=3)
    assert len(data) == 24 and data.labels[:4] == [0, 1, 2, 0]
    assert data.paths[1] == "train/b/bakery/shop/00000001.jpg"
    image, label = data[4]
    noise = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert label == 1 and image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert np.corrcoef(image.ravel(), noise.ravel())[0, 1] > 0.4  # JPEG is unkind to noise
    names = {"0": "abbey", "1": "bakery/shop", "2": "coast"}
    assert data.get_index_mapping() == names
    assert MiniPlacesLoader(str(root), split="val").get_index_mapping() == names
    assert count_classes(root) == 3
    tensor, _ = MiniPlacesLoader(root, split="val", transforms=VAL)[0]
    assert tensor.shape == (3, 128, 128)


def test_the_largest_label_may_stand_in_val(root):
    (root / "val.txt").write_text("val/00000000.jpg 41\n")
    assert count_classes(root) == 42
    (root / "val.txt").unlink()
    assert count_classes(root) == 3


def test_a_plain_torch_loader_works(root):
    """The course's own driver, and students', use torch's DataLoader."""
    data = MiniPlacesLoader(root, split="train", transforms=AUGMENT)
    images, labels = next(iter(DataLoader(data, 8, shuffle=True, num_workers=1)))
    assert images.shape == (8, 3, 128, 128) and labels.dtype == torch.int64


def test_images_or_the_root_may_be_linked(root, tmp_path):
    shutil.move(root / "images", tmp_path / "elsewhere")
    (root / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "linked").symlink_to(root)
    assert MiniPlacesLoader(tmp_path / "linked")[0][0].shape == (64, 64, 3)


def test_a_label_file_elsewhere(root, tmp_path):
    (tmp_path / "few.txt").write_text("train/c/coast/00000002.jpg 7\n")
    data = MiniPlacesLoader(root, tmp_path / "few.txt", num_classes=8)
    assert data.labels == [7] and data.get_index_mapping() == {"7": "coast"}


# --- label files ----------------------------------------------------------------------------


def test_bom_crlf_blank_lines_and_spaces_are_fine(root):
    text = "\ufeff\r\nval/00000000.jpg 0\r\n\r\n  val/00000001.jpg\t 2  \r\nval/my photo.jpg 1"
    (root / "val.txt").write_bytes(text.encode())
    data = MiniPlacesLoader(root, split="val")
    assert data.paths == ["val/00000000.jpg", "val/00000001.jpg", "val/my photo.jpg"]
    assert data.labels == [0, 2, 1]


NAMES = [
    "Screenshot 2024-03-01 at 9.41.00\u202fAM.jpg",  # macOS
    "Sn\u00edmek v\u00a013.05.jpg",
    "\u5199\u771f\u30001.jpg",
    "\u0645\u06cc\u200c\u062e.jpg",  # a zero-width non-joiner, as Persian has it
    "\u200eIMG-1.jpg",
    "\U0001f468\u200d\U0001f33e 1.jpg",
    "..a. b .jpg",
    "12:30.jpg",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_that_a_file_system_holds_is_read(root, name):
    save_image(root / "images" / "val" / "x.png", np.full((4, 4, 3), 9, np.uint8))
    (root / "images" / "val" / "x.png").rename(root / "images" / "val" / name)
    (root / "val.txt").write_text(f"val/{name} 2\n", encoding="utf-8")
    data = MiniPlacesLoader(root, split="val")
    assert data.paths == [f"val/{name}"] and (data[0][0] == 9).all() and data[0][1] == 2


BAD_LINES = {
    "val/0.jpg": "line 3: expected 'path label', got 'val/0.jpg'",
    "7": "line 3: expected 'path label', got '7'",
    "val/0.jpg abbey": "line 3: expected 'path label', got 'val/0.jpg abbey'",
    "val/0.jpg 1.0": "line 3: expected 'path label', got 'val/0.jpg 1.0'",
    "val/0.jpg -1": "line 3: expected 'path label', got 'val/0.jpg -1'",
    "val/0.jpg 1_0": "line 3: expected 'path label', got 'val/0.jpg 1_0'",
    "val/0.jpg ٣": "line 3: expected 'path label', got 'val/0.jpg ٣'",
    "val/0.jpg 100": "line 3: label 100 is not in 0..99",
    "val/0.jpg " + "9" * 5000: f"line 3: label {'9' * 20} is not in 0..9999",
    "../secret.jpg 0": "line 3: '../secret.jpg' is not a plain path below the image folder",
    "val/../../x.jpg 0": "line 3: 'val/../../x.jpg' is not a plain path below the image folder",
    "/etc/passwd 0": "line 3: '/etc/passwd' is not a plain path below the image folder",
    "C:/x.jpg 0": "line 3: 'C:/x.jpg' is not a plain path below the image folder",
    "val\\0.jpg 0": r"line 3: 'val\\0.jpg' is not a plain path below the image folder",
    "val//0.jpg 0": "line 3: 'val//0.jpg' is not a plain path below the image folder",
    "./val/0.jpg 0": "line 3: './val/0.jpg' is not a plain path below the image folder",
    "val/\0.jpg 0": r"line 3: 'val/\x00.jpg' is not a plain path below the image folder",
    "val/\x85.jpg 0": r"line 3: 'val/\x85.jpg' is not a plain path below the image folder",
    "val/a\rb.jpg 0": r"line 3: 'val/a\rb.jpg' is not a plain path below the image folder",
    "val/a.jpg 1": "line 3: 'val/a.jpg' is listed already, in line 1",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=[m[:45] for m in BAD_LINES.values()])
def test_a_bad_line_is_named(root, line):
    (root / "val.txt").write_bytes(f"val/a.jpg 0\n\n{line}\nval/b.jpg 0\n".encode())
    with pytest.raises(UserError) as error:
        MiniPlacesLoader(root, split="val")
    assert str(error.value) == f"{root / 'val.txt'}, {BAD_LINES[line]}"


def test_a_line_separator_in_a_name_does_not_break_the_message(root):
    (root / "val.txt").write_text("val/\u2028.jpg 0\n" * 2, encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2: 'val/\\u2028.jpg' is listed already, in line 1"):
        MiniPlacesLoader(root, split="val")


def test_bytes_that_are_no_text(root):
    (root / "train.txt").write_bytes(b"train/a.jpg 0\nval/\xff\xfe.jpg 0\n")
    with pytest.raises(UserError, match="line 2: this is not UTF-8 text$"):
        count_classes(root)


def test_a_label_file_is_parsed_once_and_again_when_it_changes(root, monkeypatch):
    calls = []
    parse = custom_dataloader._parse_row
    monkeypatch.setattr(custom_dataloader, "_parse_row", lambda *a: calls.append(a) or parse(*a))
    (root / "train.txt").write_text("train/c/coast/00000002.jpg 2\n")
    assert count_classes(root) == 3
    first, again = MiniPlacesLoader(root), MiniPlacesLoader(root)
    first.labels[0] = first.paths[0] = None
    assert again.labels == [2] and len(calls) == 1 + 7  # val.txt has 7 lines
    (root / "train.txt").write_text("train/c/coast/00000002.jpg 1\n")
    assert MiniPlacesLoader(root).labels == [1]


def test_a_million_lines_take_seconds(tmp_path):
    rows = (f"train/{i % 26}/category {i % 365}/{i:08d}.jpg {i % 365}\n" for i in range(10**6))
    (tmp_path / "train.txt").write_text("".join(rows))
    begun = time.process_time()
    paths, labels = read_label_file(tmp_path / "train.txt", 365)
    read_label_file(tmp_path / "train.txt", 365)
    assert time.process_time() - begun < 6  # 1.3 s on an idle machine
    assert paths[-1] == "train/13/category 264/00999999.jpg" and labels[-1] == 264


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60) | st.text("val/.jpg 0123\r\n\t:\\\ufeff", max_size=60))
def test_any_label_file_is_read_or_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz" / "train.txt"
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    try:
        loader = MiniPlacesLoader(path.parent, num_classes=9)
    except UserError as e:
        assert "\n" not in str(e) and str(path) in str(e)
    else:
        assert len(set(loader.paths)) == len(loader.labels) > 0
        inside = loader.image_folder.resolve()
        assert all(inside in (inside / p).resolve().parents for p in loader.paths)
        assert all(0 <= label < 9 for label in loader.labels)


def test_what_is_missing_is_said_in_one_line(root, tmp_path):
    def message(*args, **kwargs):
        with pytest.raises(UserError) as error:
            MiniPlacesLoader(*args, **kwargs)
        return str(error.value)

    os.mkfifo(tmp_path / "pipe")
    assert message(root, tmp_path / "pipe") == f"the label file {tmp_path / 'pipe'} is a pipe"
    download = f"sh {relpath(ROOT / 'download_dataset.sh')}"
    draw = f"python {relpath(ROOT / 'code' / 'make_sample_data.py')} draws a small set"
    get = f"{download} downloads MiniPlaces, {draw}"
    assert message(tmp_path / "no") == f"there is no folder {tmp_path / 'no'}; {get}"
    missing = f"there is no label file {root / 'test.txt'}; {download} downloads it"
    assert message(root, split="test") == missing
    assert "the split is train, val or test; got 'trian'" in message(root, split="trian")
    (root / "train.txt").write_text("\n \n")
    assert message(root).startswith(f"{root / 'train.txt'} lists no images; {download}")
    shutil.rmtree(root / "images")
    assert message(root) == f"there is no folder {root / 'images'}; {get}"
