"""Damaged, odd and missing input: works, or is one clear line, and never a wrong sample."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import main
from custom_dataloader import MiniPlacesLoader, read_label_file
from deepvision import checkpoint
from deepvision.data.loader import ResumableBatchSampler
from deepvision.models import registry
from deepvision.runtime import run_logger
from utils import MAX_PIXELS, UserError, load_image

CODE = Path(main.__file__).parent
RGB = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def encode(image, suffix=".png", *options):
    """The bytes of an image file; colours in OpenCV's order, BGR."""
    return cv2.imencode(suffix, image, options)[1].tobytes()


def saved(tmp_path, data):
    (tmp_path / "image").write_bytes(data)
    return tmp_path / "image"


def rotated(jpeg, orientation):
    """The same JPEG with an EXIF orientation."""
    tiff = b"II*\0\x08\0\0\0" + b"\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([orientation]) + b"\0" * 7
    exif = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.full((5, 7), 77, np.uint8), (77, 77, 77)),
        (np.full((5, 7, 4), (30, 20, 10, 0), np.uint8), (10, 20, 30)),
        (np.full((5, 7), 0x4D00, np.uint16), (77, 77, 77)),
        (np.full((5, 7, 3), (0x1E00, 0x1400, 0xA00), np.uint16), (10, 20, 30)),
        (np.full((1, 1, 3), (30, 20, 10), np.uint8), (10, 20, 30)),
    ],
    ids=["grey", "alpha", "16-bit grey", "16-bit", "1x1"],
)
def test_other_kinds_of_pixels_become_rgb(tmp_path, image, expected):
    loaded = load_image(saved(tmp_path, encode(image)))
    assert loaded.dtype == np.uint8 and loaded.shape == (*image.shape[:2], 3)
    assert (loaded == expected).all()


def test_cmyk_becomes_rgb(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    pil.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    assert np.abs(load_image(tmp_path / "red.jpg").astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_an_exif_rotation_is_applied(tmp_path, orientation, turns):
    jpeg = encode(cv2.GaussianBlur(RGB, (9, 9), 0), ".jpg")
    upright = load_image(saved(tmp_path, jpeg))
    turned = load_image(saved(tmp_path, rotated(jpeg, orientation)))
    assert np.array_equal(turned, np.rot90(upright, turns))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tiff", ".ppm"])
def test_a_file_that_was_cut_off_is_refused_wherever_it_was_cut(tmp_path, suffix):
    """OpenCV's imread would fill up a JPEG in grey."""
    data = encode(RGB, suffix)
    whole = load_image(saved(tmp_path, data))
    for length in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 1]:
        # a download that had reserved its space is full of zeros; some formats cannot tell
        for padding in (b"", bytes(200))[: 1 + (suffix in (".jpg", ".png"))]:
            path = saved(tmp_path, data[:length] + padding)
            try:
                assert np.array_equal(load_image(path), whole), (length, padding)
            except UserError as e:
                assert re.fullmatch(
                    f"cannot read the image {path}: it is (empty or damaged|damaged or not an "
                    "image)",
                    str(e),
                )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty or damaged"),
        (b"<html>quota exceeded</html>", "it is damaged or not an image"),
        (encode(np.zeros((1, 101, 3), np.uint8)), "101×1 pixels are a strip"),
    ],
    ids=["empty", "web page", "strip"],
)
def test_what_is_no_picture_is_refused(tmp_path, data, reason):
    path = saved(tmp_path, data)
    with pytest.raises(UserError) as refusal:
        load_image(path)
    assert str(refusal.value) == f"cannot read the image {path}: {reason}"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError) as refusal:
        load_image(tmp_path / "x.jpg")
    path = tmp_path / "x.jpg"
    assert str(refusal.value) == f"cannot read the image {path}: No such file or directory"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_folders_pipes_and_devices_are_no_images(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    for path in tmp_path.iterdir():
        with pytest.raises(UserError) as refusal:
            load_image(path)
        assert str(refusal.value) == f"cannot read the image {path}: it is not a file"


def png_of_zeros(side):
    """A grey square, a thousandth of the size of its pixels."""

    def chunk(kind, data):
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    row, packer = bytes(side + 1), zlib.compressobj(1)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


MEMORY = """
import resource, sys
from utils import UserError, load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        load_image(path)
    except UserError as e:
        print(e)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is the system's own")
def test_decompression_bombs_are_refused_before_they_take_the_memory(tmp_path):
    pixels, part, claim = (tmp_path / name for name in ("many pixels", "long part", "claim"))
    pixels.write_bytes(png_of_zeros(16_384))
    part.write_bytes(png_of_zeros(9).replace(b"\0\0\0\x0dIHDR", b"\x7f\xff\xff\xffIHDR"))
    jpeg = encode(RGB, ".jpg")
    size = jpeg.index(b"\xff\xc0") + 5
    claim.write_bytes(jpeg[:size] + b"\x40\0\x40\0" + jpeg[size + 4 :])  # 16,384 squared
    words = [sys.executable, "-c", MEMORY, str(pixels), str(part), str(claim)]
    done = subprocess.run(words, cwd=CODE, capture_output=True, text=True, check=True)
    *lines, megabytes = done.stdout.splitlines()
    assert lines == [
        f"cannot read the image {pixels}: it has over {MAX_PIXELS:,} pixels",
        f"cannot read the image {part}: it is damaged or not an image",
        f"cannot read the image {claim}: it has over {MAX_PIXELS:,} pixels",
    ]
    assert int(megabytes) < 50 and done.stderr == ""


# ---------------------------------------------------------------------------------------------
# Label files
# ---------------------------------------------------------------------------------------------

NOT_PLAIN = "is not a plain path below the image folder"
GOOD = "train/a/b/1.jpg 0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train/a/b/1.jpg\n", "line 1: expected 'path label', got 'train/a/b/1.jpg'"),
        (GOOD + "\n x.jpg one\n", "line 3: expected 'path label', got ' x.jpg one'"),
        (GOOD + "x.jpg -1\n", "line 2: expected 'path label', got 'x.jpg -1'"),
        (GOOD + "x.jpg 10\n", "line 2: label 10 is not in 0..9"),
        (GOOD + GOOD, "line 2: train/a/b/1.jpg is listed already, in line 1"),
        ("../../etc/x.jpg 1\n", f"line 1: '../../etc/x.jpg' {NOT_PLAIN}"),
        ("a/../../x.jpg 1\n", f"line 1: 'a/../../x.jpg' {NOT_PLAIN}"),
        ("/etc/x.jpg 1\n", f"line 1: '/etc/x.jpg' {NOT_PLAIN}"),
        ("C:/x.jpg 1\n", f"line 1: 'C:/x.jpg' {NOT_PLAIN}"),
        (b"\xff\xfe\n", "line 1: this is not UTF-8 text"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_a_wrong_line_is_told_with_its_number(tmp_path, text, message):
    path = tmp_path / "train.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refusal:
        read_label_file(path, 10)
    assert str(refusal.value) == f"{path}, {message}"


def test_files_of_windows_editors_and_linked_folders_are_normal(sample_root, tmp_path):
    (tmp_path / "images").symlink_to(sample_root / "images", target_is_directory=True)
    lines = (sample_root / "train.txt").read_text().splitlines()
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", ""]).encode())
    dataset = MiniPlacesLoader(tmp_path, num_classes=10)
    assert [f"{p} {n}" for p, n in zip(dataset.paths, dataset.labels, strict=True)] == lines
    assert dataset[3][0].shape[2] == 3


# ---------------------------------------------------------------------------------------------
# Whole runs, with a small network
# ---------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Colours to scores; not a number for a black image."""

    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        mean = x.mean((2, 3))
        return self.fc(mean) + 0 * (mean.sum(1, keepdim=True) + 5).log()


@pytest.fixture
def data(sample_root, tmp_path):
    """A copy of the sample data to spoil."""
    return shutil.copytree(sample_root, tmp_path / "data")


@pytest.fixture
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(run_logger, "LOGS", tmp_path / "logs")
    monkeypatch.setitem(registry.MODEL_REGISTRY, "torch_conv", Small)
    return tmp_path / "logs"


def run(capsys, *words):
    """(exit code, lines of stdout, lines of stderr) of main.py in this process."""
    status = main.main([*map(str, words), "--gpu=-1", "-j=0", "-b=16", "--warmup=0"])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def training_images(data):
    return [line.split()[0] for line in (data / "train.txt").read_text().splitlines()]


def test_skipped_images_are_counted_listed_and_the_same_after_a_resume(data, logs, capsys):
    names = training_images(data)
    spoilt = [names[5], "val/" + os.listdir(data / "images" / "val")[0]]
    good = (data / "images" / spoilt[0]).read_bytes()
    for name in spoilt:
        (data / "images" / name).write_bytes(good[: len(good) // 2])
    status, _, err = run(capsys, data, "--epochs=1")
    assert status == 1 and len(err) == 1 and spoilt[0] in err[0]
    shutil.rmtree(logs)

    status, out, err = run(capsys, data, "--epochs=1", "--skip-bad-images")
    assert (status, err) == (0, [])
    assert {f"left out: {name}" for name in spoilt} <= set(out)
    assert "2 images are left out." in out
    [folder] = logs.iterdir()
    assert json.loads((folder / "config.json").read_text())["left_out"] == sorted(spoilt)

    (data / "images" / spoilt[0]).write_bytes(good)  # the resumed run does without it all the same
    last = folder / "models" / checkpoint.LAST
    status, out, _ = run(capsys, data, "--epochs=2", f"--resume={last}")
    assert status == 0 and "2 images are left out." in out
    assert checkpoint.load(last)["left_out"] == sorted(spoilt)


def test_a_run_that_a_bad_image_stopped_goes_on_without_it(data, logs, capsys):
    assert run(capsys, data, "--epochs=1")[0] == 0
    bad = training_images(data)[5]
    (data / "images" / bad).write_bytes(b"")
    last = next(logs.iterdir()) / "models" / checkpoint.LAST
    assert run(capsys, data, "--epochs=2", f"--resume={last}")[0] == 1
    status, out, _ = run(capsys, data, "--epochs=2", f"--resume={last}", "--skip-bad-images")
    assert status == 0 and f"left out: {bad}" in out
    assert checkpoint.load(last)["left_out"] == [bad]


def test_all_images_bad_is_an_error(data, logs, capsys):
    for name in training_images(data):
        (data / "images" / name).write_bytes(b"")
    status, _, err = run(capsys, data, "--skip-bad-images")
    assert status == 1 and "no image that" in err[0] and not logs.exists()


def test_the_audit_finds_what_is_wrong(data, capsys):
    assert run(capsys, data, "--check-data")[0] == 0
    names, val = training_images(data), (data / "val.txt").read_text().split()[::2]
    images = data / "images"
    (images / names[1]).unlink()
    jpeg = bytearray((images / names[2]).read_bytes())
    jpeg[-400:-200] = bytes(200)  # decodes, to another picture
    (images / names[2]).write_bytes(jpeg)
    shutil.copy(images / names[3], images / val[0])
    with open(data / "train.txt", "a") as f:
        f.write("train/z/new/1.jpg 12\n")
    status, out, err = run(capsys, data, "--check-data")
    assert (status, err) == (1, [])
    problems = [line.removeprefix("problem: ") for line in out if line.startswith("problem: ")]
    assert problems[:4] == [
        "class 10 has no images in train.txt",
        "class 11 has no images in train.txt",
        "class 10 has no images in val.txt",
        "class 11 has no images in val.txt",
    ]
    assert problems[4] == "class 12 has no images in val.txt"
    assert problems[5] == f"cannot read the image {images / names[1]}: No such file or directory"
    assert problems[6].startswith(f"the image {images / names[2]} is damaged: Corrupt JPEG data")
    assert problems[8] == f"{val[0]} of val.txt shows the same as {names[3]} of train.txt"
    assert out[-1] == "9 problems" and len(problems) == 9


def test_the_audit_tells_of_missing_files(tmp_path, capsys):
    status, out, _ = run(capsys, tmp_path / "nowhere", "--check-data")
    missing = f"problem: there is no folder {tmp_path / 'nowhere'}; "
    assert status == 1 and sum(line.startswith(missing) for line in out) == 2


def test_a_loss_that_is_not_finite_names_its_batch(data, logs, capsys):
    """Lines are printed at steps 0 and 10 alone; it happens between them."""
    names = training_images(data)
    order = ResumableBatchSampler(len(names), 16, 2024)
    black = order.indices(1, 3)[7]
    step = next(i for i in range(5) if black in order.indices(0, i))
    assert step > 0
    size = load_image(data / "images" / names[black]).shape
    (data / "images" / names[black]).write_bytes(encode(np.zeros(size, np.uint8)))
    status, _, err = run(capsys, data, "--epochs=2", "--lr=0.01", "--save-every=1")
    assert status == 1 and len(err) == 1
    [folder] = logs.iterdir()
    batch = [names[i] for i in order.indices(0, step)]
    assert re.fullmatch(
        rf"error: the loss became nan in epoch 1, step {step + 1} of 5 \(learning rate 0\.0\d+\), "
        rf"on {batch[0]} and 15 more, listed in \S+/bad_batch\.txt; the last good checkpoint is "
        rf"\S+/{checkpoint.LAST}: try a lower --lr",
        err[0],
    )
    assert (folder / "bad_batch.txt").read_text().splitlines() == batch
    content = checkpoint.load(folder / "models" / checkpoint.LAST)
    assert content["progress"]["position"] == step and not checkpoint.first_nonfinite(content)
    shutil.rmtree(logs)
    status, _, err = run(capsys, data, "--epochs=2", "--lr=0.01")  # with no save before it
    assert status == 1 and f"step {step + 1} of 5" in err[0] and "none was saved" in err[0]


def test_weights_that_are_not_finite_are_not_saved(data, logs, capsys, monkeypatch):
    """The last step of an epoch spoils them; its loss is finite still."""
    step = torch.optim.SGD.step

    def spoil(optimizer, *args, **options):
        step(optimizer, *args, **options)
        spoil.steps += 1
        if spoil.steps == 10:
            optimizer.param_groups[0]["params"][0].data[0, 0] = torch.inf

    spoil.steps = 0
    monkeypatch.setattr(torch.optim.SGD, "step", spoil)
    status, _, err = run(capsys, data, "--epochs=3", "--lr=0.01")
    assert status == 1 and "fc.weight is no longer finite in epoch 2, step 5 of 5" in err[0]
    [folder] = logs.iterdir()
    for file in (folder / "models").iterdir():
        content = checkpoint.load(file)
        assert content["epoch"] == 1 and not checkpoint.first_nonfinite(content)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


# ---------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A real file system of 512 kB, under logs/."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    folder = tmp_path / "logs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("where", ["events", "curves", "metrics", "checkpoint"])
def test_a_disk_that_fills_up_is_one_line(data, disk, logs, capsys, monkeypatch, where):
    """In mid-run, just before one of the files is written; what was saved is whole."""
    owner, name = {
        "events": (run_logger.RunLogger, "step"),
        "curves": (run_logger.RunLogger, "point"),
        "metrics": (run_logger, "write_atomically"),
        "checkpoint": (checkpoint, "write_atomically"),
    }[where]
    original = getattr(owner, name)

    def fill_first(*args, **options):
        if any(disk.glob(f"*/models/{checkpoint.LAST}")):
            with open(disk / "filler", "wb") as f:
                while True:
                    try:
                        os.write(f.fileno(), bytes(512))
                    except OSError:
                        break
        return original(*args, **options)

    monkeypatch.setattr(owner, name, fill_first)
    status, _, err = run(capsys, data, "--epochs=3", "--lr=0.01", "-p=1")
    assert status == 1 and len(err) == 1
    assert re.fullmatch(r"error: cannot write \S+: No space left on device(; what was .*)?", err[0])
    [last] = disk.glob(f"*/models/{checkpoint.LAST}")
    assert checkpoint.load(last)["epoch"] == 1
    (disk / "filler").unlink()
    monkeypatch.undo()
    monkeypatch.setattr(run_logger, "LOGS", disk)
    monkeypatch.setitem(registry.MODEL_REGISTRY, "torch_conv", Small)
    assert run(capsys, data, "--epochs=3", "--lr=0.01", "--resume=auto")[0] == 0


def test_a_folder_name_that_is_too_long_is_one_line(capsys):
    status, _, err = run(capsys, "x" * 5000)
    assert status == 1 and len(err) == 1 and err[0].startswith("error: there is no folder xxx")


def test_logs_that_cannot_be_written_are_one_line(data, disk, logs, capsys):
    run(capsys, data, "--epochs=1", "--lr=0.01")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    before = sorted(disk.rglob("*"))
    for words in (["--epochs=1"], ["--epochs=2", "--resume=auto"]):
        status, _, err = run(capsys, data, *words)
        assert status == 1 and len(err) == 1
        assert re.match(r"error: cannot (make|write) .*: Read-only file system", err[0])
    assert sorted(disk.rglob("*")) == before


def test_a_folder_that_becomes_read_only_in_mid_run(data, disk, logs, capsys, monkeypatch):
    """Between two saves; what was saved is whole."""
    original = checkpoint.write_atomically

    def lock_first(path, *args, **options):
        if path.exists():
            mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(path.parent)]
            subprocess.run(mount, check=True)
        return original(path, *args, **options)

    monkeypatch.setattr(checkpoint, "write_atomically", lock_first)
    status, _, err = run(capsys, data, "--epochs=3", "--lr=0.01", "--save-every=2")
    [models] = disk.glob("*/models")
    subprocess.run(["umount", str(models)], check=True)
    assert status == 1 and err == [
        f"error: cannot write {models / checkpoint.LAST}: Read-only file system; "
        "what was there is intact"
    ]
    assert checkpoint.load(models / checkpoint.LAST)["progress"]["position"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_an_output_that_cannot_be_written_is_one_line(data, logs, capsys, monkeypatch):
    """As with `> logs/output.txt` on a full disk, or after `| head`."""
    monkeypatch.setattr(sys, "stdout", full := open("/dev/full", "w"))  # noqa: SIM115
    status = main.main([str(data), "--epochs=1", "--gpu=-1", "-j=0", "-b=16", "--save-every=1"])
    with contextlib.suppress(OSError):
        full.close()
    told = "cannot write the output: {}; what was saved is whole\n".format
    assert status == 1 and capsys.readouterr().err == "error: " + told("No space left on device")
    ours, theirs = os.pipe()
    os.close(ours)
    words = [sys.executable, "main.py", str(data), "--check-data", "-j=0"]
    done = subprocess.run(words, cwd=CODE, stdout=theirs, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: " + told("Broken pipe"))


def test_logs_that_are_a_file_are_one_line(data, logs, capsys):
    logs.write_text("")
    status, _, err = run(capsys, data, "--epochs=1")
    assert status == 1 and re.match("error: cannot make the run folder .*: Not a directory", err[0])


# ---------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------


def children(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_worker_that_dies_is_one_line(sample_root, tmp_path):
    tree = shutil.copytree(CODE, tmp_path / "code")
    words = [sys.executable, "main.py", str(sample_root), "--gpu=-1", "-j=2", "-b=16"]
    process = subprocess.Popen(
        [*words, "--epochs=500", "-p=1"],
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "Epoch: [1][1/" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(children(process.pid)[0], signal.SIGKILL)
    begun = time.monotonic()
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and time.monotonic() - begun < 60
    assert err == (
        "error: a process that loads images died (memory may have run out, or /dev/shm is full): "
        "use fewer of them, -j 1 or -j 0\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_a_full_dev_shm_is_one_line(sample_root, tmp_path):
    """In a mount name space of its own, where /dev/shm holds less than one batch."""
    tree = shutil.copytree(CODE, tmp_path / "code")
    words = [sys.executable, "main.py", str(sample_root), "--gpu=-1", "-j=2", "-b=16"]
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    namespace = ["unshare", "-m", "sh", "-c"]
    if subprocess.run([*namespace, mount, "sh", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a file system")
    done = subprocess.run(
        [*namespace, mount, "sh", *words], cwd=tree, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: a process that loads images died \(.*/dev/shm is full\): use fewer of them, -j 1 "
        r"or -j 0\n",
        done.stderr,
    )
