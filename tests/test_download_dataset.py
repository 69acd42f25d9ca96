"""download_dataset.sh, run as users run it, against a real local server that misbehaves."""

from __future__ import annotations

import ast
import gzip
import http.server
import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "download_dataset.sh"
COUNTS = {"train": 40, "val": 12, "test": 12}
MAGIC = b"\x1f\x8b"
PAGE = b"<!DOCTYPE html><html><title>Quota exceeded</title></html>" * 100

pytestmark = pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell")
needs_gdown = pytest.mark.skipif(importlib.util.find_spec("gdown") is None, reason="needs gdown")


class Site:
    """A web server on loopback; its attributes say how it misbehaves."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.drop: int | None = None  # cut each reply after so many bytes
        self.ranges = True
        self.shift = 0  # answer a range that begins so many bytes too early
        self.extra = 0  # bytes promised, never sent
        self.length = True  # send Content-Length
        self.etag: str | None = '"1"'
        self.status = 200
        self.stall = 0.0  # seconds of silence, once, within a reply
        self.rate = 0  # bytes a second, 0 = at once
        self.requests: list[tuple[str, str | None]] = []
        self.sent = 0
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.requests.append((handler.path, wanted))
        body = self.files.get(handler.path)
        if body is None or self.status != 200:
            return handler.send_error(404 if body is None else self.status)
        start, total = 0, len(body) + self.extra
        if wanted and self.ranges and handler.headers.get("If-Range", self.etag) == self.etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) - self.shift
            if start >= total:
                return handler.send_error(416)
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if self.length:
            handler.send_header("Content-Length", str(total - start))
        if self.etag:
            handler.send_header("ETag", self.etag)
        handler.end_headers()
        return self.send(handler, body[start:][: self.drop])

    def send(self, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        step = max(1, self.rate // 100 if self.rate else len(body) // 2 + 1)
        try:
            for i in range(0, len(body), step):
                if i and self.stall:
                    pause, self.stall = self.stall, 0.0
                    time.sleep(pause)
                handler.wfile.write(body[i : i + step])
                self.sent += len(body[i : i + step])
                time.sleep(step / self.rate if self.rate else 0)
        except OSError:
            pass  # the client is gone


@pytest.fixture
def site(archive):
    labels = {"/train.txt": label_file("train"), "/val.txt": label_file("val")}
    site = Site({"/data.tar.gz": archive, **labels})
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture(scope="module")
def archive() -> bytes:
    return pack(contents())


def image_path(split: str, i: int) -> str:
    return f"train/a/abbey/{i:08d}.jpg" if split == "train" else f"{split}/{i:08d}.jpg"


def label_file(split: str) -> bytes:
    lines = (f"{image_path(split, i)} {i % 3}\n" for i in range(COUNTS[split]))
    return "".join(lines).encode()


def contents() -> dict[str, bytes]:
    """What the archive holds: incompressible "images" and a few object files."""
    rng = random.Random(0)
    names = [f"images/{image_path(s, i)}" for s, n in COUNTS.items() for i in range(n)]
    files = {name: b"\xff\xd8" + rng.randbytes(rng.randrange(500, 3000)) for name in names}
    return files | {f"objects/train/a/abbey/{i:08d}.xml": b"<annotation/>" for i in range(3)}


def pack(files: dict[str, bytes], *first: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in first:
            tar.addfile(member)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(data: Path, site: Site | None, **changes: str) -> subprocess.Popen:
    """Start the script; without a site there is no server."""
    url = site.url if site else f"http://127.0.0.1:{free_port()}"
    settings = {
        "PYTHON": sys.executable,
        "MINIPLACES_DIR": str(data),
        "MINIPLACES_URLS": f"{url}/data.tar.gz",
        "MINIPLACES_DRIVE": "",
        "MINIPLACES_LABELS": url,
        "MINIPLACES_MIN_BYTES": "1000",
        "MINIPLACES_COUNTS": "40 12 12",
        "MINIPLACES_TIMEOUT": "5",
        "MINIPLACES_WAIT": "0.01",
    }
    inherited = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    return subprocess.Popen(
        ["sh", str(SCRIPT)],
        env=inherited | settings | changes,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def download(data: Path, site: Site | None, **changes: str) -> tuple[int, str]:
    """The exit code, and all that was said."""
    process = start(data, site, **changes)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    assert err.count("\n") <= 1, f"more than one line of complaint:\n{err}"
    assert bool(err) == bool(process.returncode), (process.returncode, err)
    return process.returncode, out + err


def assert_whole(data: Path) -> None:
    """Everything is there, byte for byte, and nothing else."""
    found = {p.relative_to(data).as_posix(): p.read_bytes() for p in data.rglob("*") if p.is_file()}
    found.pop(".download.lock", None)
    expected = contents() | {f"{s}.txt": label_file(s) for s in ("train", "val")}
    assert found.keys() == expected.keys()
    assert found == expected
    assert not (data / ".unpacking").exists()


def part_of(data: Path) -> bytes:
    return (data / "data.tar.gz.part").read_bytes()


def prepare_part(data: Path, archive: bytes, n: int, version: str | None = '"1"') -> None:
    """What an interrupted download leaves after n bytes."""
    (data / "data.tar.gz.part").write_bytes(archive[:n])
    note = {"version": version, "total": len(archive)}
    (data / "data.tar.gz.part.json").write_text(json.dumps(note))


def prepare_labels(data: Path) -> None:
    for split in ("train", "val"):
        (data / f"{split}.txt").write_bytes(label_file(split))


# ---- A well-behaved server


def test_downloads_then_says_it_is_complete(site, tmp_path):
    data = tmp_path / "new" / "data"
    code, said = download(data, site)
    assert code == 0 and "Done: 40 train, 12 val, 12 test" in said
    assert_whole(data)
    asked = len(site.requests)
    code, said = download(data, site)
    assert code == 0 and "Already complete: 40 train, 12 val, 12 test" in said
    assert len(site.requests) == asked  # not one request more


def test_a_data_prefix_inside_the_archive_is_understood(site, tmp_path):
    site.files["/data.tar.gz"] = pack({f"./data/{k}": v for k, v in contents().items()})
    assert download(tmp_path, site)[0] == 0
    assert_whole(tmp_path)


def test_linked_folders_are_followed(site, tmp_path):
    download(tmp_path / "disk", site)
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    assert "Already complete" in download(tmp_path / "data", site)[1]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "images").symlink_to(tmp_path / "disk" / "images")
    assert "Already complete" in download(tmp_path / "own", site)[1]


# ---- Servers that misbehave


@pytest.mark.parametrize(("have", "drop"), [(-100, 1), (0, 997), (0, 40_000)])
def test_drops_are_resumed_without_a_byte_twice(site, tmp_path, archive, have, drop):
    have %= len(archive)  # -100: all but the last hundred bytes, for time
    prepare_labels(tmp_path)
    prepare_part(tmp_path, archive, have)
    site.drop = drop
    code, said = download(tmp_path, site)
    assert code == 0, said
    assert_whole(tmp_path)
    assert site.sent == len(archive) - have


def test_without_ranges_it_starts_over(site, tmp_path, archive):
    prepare_part(tmp_path, archive, 30_000)
    site.ranges = False
    assert download(tmp_path, site)[0] == 0
    assert_whole(tmp_path)


def test_without_ranges_and_always_dropping_it_gives_up(site, tmp_path, archive):
    site.ranges, site.drop = False, 20_000
    code, said = download(tmp_path, site)
    assert code == 1 and f"wrong length: 20,000 of {len(archive):,} bytes came" in said
    assert part_of(tmp_path) == archive[:20_000]


def test_wrong_length_is_an_error_and_the_part_is_kept(site, tmp_path, archive):
    prepare_labels(tmp_path)
    site.extra = 500
    code, said = download(tmp_path, site)
    assert code == 1 and "wrong length" in said and "are kept in" in said
    assert part_of(tmp_path) == archive
    assert not (tmp_path / "images").exists()
    site.extra = 0
    assert download(tmp_path, site)[0] == 0
    assert_whole(tmp_path)


def test_the_next_run_goes_on_from_the_part(site, tmp_path, archive):
    site.ranges, site.drop = False, 50_000
    assert download(tmp_path, site)[0] == 1
    site.ranges, site.drop = True, None
    assert download(tmp_path, site)[0] == 0
    assert ("/data.tar.gz", "bytes=50000-") in site.requests
    assert_whole(tmp_path)


@pytest.mark.parametrize("etag", ['"2"', 'W/"2"', None])
def test_a_file_that_changed_on_the_server_is_not_spliced(site, tmp_path, archive, etag):
    prepare_part(tmp_path, flip(archive, 1000), 30_000)
    site.etag = etag
    assert download(tmp_path, site)[0] == 0
    assert_whole(tmp_path)


def test_without_versions_another_length_tells_that_the_file_changed(site, tmp_path):
    longer = pack({"objects/more.xml": random.Random(1).randbytes(2000), **contents()})
    prepare_part(tmp_path, longer, 30_000, version=None)
    site.etag = None
    assert download(tmp_path, site)[0] == 0
    assert_whole(tmp_path)


@pytest.mark.parametrize("shift", [1, 29_999])
def test_another_range_than_asked_for_is_not_appended(site, tmp_path, archive, shift):
    prepare_part(tmp_path, archive, 30_000)
    site.shift = shift
    assert download(tmp_path, site)[0] == 0
    assert_whole(tmp_path)


@pytest.mark.parametrize("note", [None, "", "[]", '{"total": 1}', '{"version": 3, "total": "x"}'])
def test_a_part_of_unknown_origin_is_downloaded_again(site, tmp_path, note):
    (tmp_path / "data.tar.gz.part").write_bytes(MAGIC + b"other" * 1000)
    if note is not None:
        (tmp_path / "data.tar.gz.part.json").write_text(note)
    assert download(tmp_path, site)[0] == 0
    assert_whole(tmp_path)


def test_a_part_longer_than_the_file(site, tmp_path, archive):
    prepare_part(tmp_path, archive, len(archive))
    with (tmp_path / "data.tar.gz.part").open("ab") as file:
        file.write(b"too much")
    assert download(tmp_path, site)[0] == 0
    assert_whole(tmp_path)


def test_unknown_length_is_accepted(site, tmp_path):
    site.length = False
    assert download(tmp_path, site)[0] == 0
    assert_whole(tmp_path)


def test_silence_counts_as_a_broken_connection(site, tmp_path):
    site.stall = 1.5
    code, said = download(tmp_path, site, MINIPLACES_TIMEOUT="0.5")
    assert code == 0, said
    assert any(wanted for _, wanted in site.requests)  # it hung up and asked for the rest
    assert_whole(tmp_path)


@pytest.mark.parametrize("had", [0, 30_000])
def test_a_web_page_is_refused_and_costs_nothing(site, tmp_path, archive, had):
    if had:
        prepare_part(tmp_path, archive, had)
    site.files["/data.tar.gz"], site.ranges = PAGE, False
    code, said = download(tmp_path, site)
    assert code == 1 and "a web page came instead of the archive" in said
    assert part_of(tmp_path) == archive[:had] if had else not list(tmp_path.glob("*.part*"))


def test_a_file_too_small_is_refused_before_it_is_downloaded(site, tmp_path):
    code, said = download(tmp_path, site, MINIPLACES_MIN_BYTES="200000000")
    assert code == 1 and "the archive has at least 200,000,000" in said
    assert not list(tmp_path.glob("*.part*"))


def test_the_next_source_is_tried(site, tmp_path):
    urls = f"{site.url}/gone.tar.gz nonsense {site.url}/page {site.url}/data.tar.gz"
    site.files["/page"] = PAGE
    code, said = download(tmp_path, site, MINIPLACES_URLS=urls)
    assert code == 0 and "the server says 404" in said and "not an address" in said
    assert_whole(tmp_path)


def test_an_overloaded_server_is_asked_again(site, tmp_path):
    site.status = 503
    code, said = download(tmp_path, site)
    assert code == 1 and "the server says 503" in said
    assert [path for path, _ in site.requests].count("/data.tar.gz") == 3


def test_offline_says_so_and_loses_nothing(tmp_path, archive):
    prepare_part(tmp_path, archive, 30_000)
    code, said = download(tmp_path, None)
    assert code == 1 and "no connection" in said and "put the archive at" in said
    assert part_of(tmp_path) == archive[:30_000]


def test_a_complete_part_needs_no_network(tmp_path, archive):
    prepare_part(tmp_path, archive, len(archive))
    prepare_labels(tmp_path)
    assert download(tmp_path, None)[0] == 0
    assert_whole(tmp_path)


# ---- Label files


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (PAGE, "a web page came"),
        (b"train/a.jpg 0\n" * 7, "no train.txt: 7 lines of 40"),
        (b"train/a.jpg 0\ntrain/b.jpg\n" * 40, "line 2 is not `path label`"),
    ],
)
def test_bad_labels_do_not_cost_the_images(site, tmp_path, content, complaint):
    site.files["/train.txt"] = content
    code, said = download(tmp_path, site)
    assert code == 1 and complaint in said
    assert (tmp_path / "images").exists() and not (tmp_path / "train.txt").exists()
    site.files = {"/train.txt": label_file("train")}
    assert download(tmp_path, site)[0] == 0
    assert_whole(tmp_path)


def test_a_bad_label_file_already_there_is_named_and_kept(site, tmp_path):
    (tmp_path / "val.txt").write_bytes(b"cut off in the mid")
    code, said = download(tmp_path, site)
    assert code == 1 and "val.txt: line 1 is not `path label`; move or delete it" in said
    assert (tmp_path / "val.txt").read_bytes() == b"cut off in the mid"


# ---- Archives that lie


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


EVIL = {
    "parent": special("images/../../evil.jpg", tarfile.REGTYPE),
    "parent folder": special("../evil", tarfile.DIRTYPE),
    "absolute": special("/OUTSIDE/evil.jpg", tarfile.REGTYPE),
    "backslash": special("images\\..\\..\\evil.jpg", tarfile.REGTYPE),
    "drive": special("C:/evil.jpg", tarfile.REGTYPE),
    "symbolic link": special("images/train", tarfile.SYMTYPE, "../../outside"),
    "hard link": special("images/evil", tarfile.LNKTYPE, "images/val/00000000.jpg"),
    "character device": special("images/evil", tarfile.CHRTYPE),
    "block device": special("images/evil", tarfile.BLKTYPE),
    "pipe": special("images/evil", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("kind", EVIL)
def test_evil_archives_are_refused_whole(site, tmp_path, kind):
    data, outside = tmp_path / "a" / "data", tmp_path / "a" / "outside"
    data.mkdir(parents=True)
    outside.mkdir()
    EVIL[kind].name = EVIL[kind].name.replace("/OUTSIDE", str(outside))
    site.files["/data.tar.gz"] = pack(contents(), EVIL[kind])
    code, said = download(data, site)
    assert code == 1 and "refused: the archive holds" in said
    assert sorted(p.name for p in data.iterdir()) == [".download.lock", "train.txt", "val.txt"]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.parent != data) == [
        "a",
        "data",
        "outside",
    ]


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


DAMAGE = {
    "cut": lambda archive: archive[:-3000],
    "cut in its checksum": lambda archive: archive[:-5],
    "one bit": lambda archive: flip(archive, len(archive) // 2),
    "its checksum": lambda archive: flip(archive, len(archive) - 6),
    "noise": lambda archive: MAGIC + random.Random(2).randbytes(5000),
    "gzip, but no tar": lambda archive: gzip.compress(random.Random(3).randbytes(5000)),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_archives_are_refused_then_replaced(site, tmp_path, archive, how):
    site.files["/data.tar.gz"] = DAMAGE[how](archive)
    code, said = download(tmp_path, site)
    assert code == 1 and "the archive is damaged or cut off" in said
    assert not (tmp_path / "images").exists() and not list(tmp_path.glob("*.part*"))
    site.files["/data.tar.gz"] = archive
    assert download(tmp_path, site)[0] == 0
    assert_whole(tmp_path)


def test_too_few_images(site, tmp_path):
    files = contents()
    del files["images/val/00000003.jpg"]
    site.files["/data.tar.gz"] = pack(files)
    code, said = download(tmp_path, site)
    assert code == 1 and "the archive has too few images: 11 of 12 for val" in said


# ---- Interrupted, crowded, by hand


def test_killed_at_random_moments_it_ends_the_same(site, tmp_path):
    rng, kills, site.rate = random.Random(7), 0, 250_000
    for _ in range(60):
        process = start(tmp_path, site)
        try:
            process.communicate(timeout=rng.uniform(0.1, 0.7))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
        images = tmp_path / "images"  # all of them or none, at any moment
        assert not images.exists() or len(list(images.rglob("*.jpg"))) == 64
    assert kills >= 2
    site.rate = 0
    assert download(tmp_path, site)[0] == 0
    assert_whole(tmp_path)


def wait_for_bytes(part: Path) -> None:
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_leaves_one_line_and_the_part(site, tmp_path):
    site.rate = 50_000
    process = start(tmp_path, site)
    wait_for_bytes(tmp_path / "data.tar.gz.part")
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert err.strip() == "download_dataset.sh: interrupted; run it again to resume"
    assert part_of(tmp_path)


def test_only_one_at_a_time(site, tmp_path):
    site.rate = 50_000
    first = start(tmp_path, site)
    wait_for_bytes(tmp_path / "data.tar.gz.part")
    code, said = download(tmp_path, site)
    assert code == 1 and "another download into" in said
    first.communicate(timeout=30)
    assert first.returncode == 0
    assert_whole(tmp_path)


def test_leftovers_of_a_killed_unpacking_go_away(site, tmp_path):
    leftover = tmp_path / ".unpacking" / "images" / "train" / "extra.jpg"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    (tmp_path / "images").mkdir()  # an empty folder is no obstacle
    assert download(tmp_path, site)[0] == 0
    assert_whole(tmp_path)


def test_incomplete_images_are_not_touched(site, tmp_path):
    old = tmp_path / "images" / "train" / "a.jpg"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"mine")
    code, said = download(tmp_path, site)
    assert code == 1 and "incomplete (1 of 40 for train" in said and "move or delete it" in said
    assert old.read_bytes() == b"mine"


def test_an_archive_put_there_by_hand_is_used_and_kept(site, tmp_path, archive):
    (tmp_path / "data.tar.gz").write_bytes(archive)
    site.files.pop("/data.tar.gz")
    code, said = download(tmp_path, site)
    assert code == 0, said
    assert (tmp_path / "data.tar.gz").read_bytes() == archive
    (tmp_path / "data.tar.gz").unlink()
    assert_whole(tmp_path)


def test_a_bad_archive_put_there_by_hand_is_named_and_kept(site, tmp_path):
    (tmp_path / "data.tar.gz").write_bytes(PAGE)
    code, said = download(tmp_path, site)
    assert code == 0 and "a web page came instead" in said
    assert (tmp_path / "data.tar.gz").read_bytes() == PAGE


# ---- Disk


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KiB."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_too_little_disk_is_told_before_the_download(site, small_disk, archive):
    code, said = download(small_disk, site)
    assert code == 1 and "too little disk" in said and "MINIPLACES_DIR" in said
    assert not (small_disk / "data.tar.gz.part").exists() or not part_of(small_disk)


def test_a_disk_that_fills_up_keeps_what_came(site, small_disk, archive):
    site.length = False  # nothing to foresee it by
    (small_disk / "ballast").write_bytes(bytes(180_000))
    code, said = download(small_disk, site)
    assert code == 1 and "No space left on device" in said
    part = part_of(small_disk)
    assert 0 < len(part) < len(archive) and archive.startswith(part)


def test_a_disk_too_small_to_unpack_keeps_the_archive(small_disk, archive):
    prepare_labels(small_disk)
    (small_disk / "data.tar.gz").write_bytes(archive)
    code, said = download(small_disk, None)
    assert code == 1 and "too little disk" in said
    assert (small_disk / "data.tar.gz").read_bytes() == archive
    assert not (small_disk / "images").exists()


def test_a_disk_that_is_read_only_is_one_line(site, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, said = download(small_disk, site)
    assert code == 1 and said.startswith("download_dataset.sh: Read-only file system: ")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(site, tmp_path):
    tmp_path.chmod(0o500)
    code, said = download(tmp_path, site)
    tmp_path.chmod(0o700)
    assert code == 1 and "Permission denied" in said


# ---- Google Drive, and the Python it runs on


@needs_gdown
def test_gdown_is_the_last_resort(site, tmp_path):
    site.files["/drive"] = site.files.pop("/data.tar.gz")
    code, said = download(tmp_path, site, MINIPLACES_DRIVE=f"{site.url}/drive")
    assert code == 0 and "404" in said and "Google Drive" in said
    assert_whole(tmp_path)


@needs_gdown
def test_a_quota_page_from_drive_is_no_archive(site, tmp_path):
    site.files = {"/drive": PAGE}
    code, said = download(tmp_path, site, MINIPLACES_DRIVE=f"{site.url}/drive")
    assert code == 1 and "a web page came instead of the archive" in said
    assert not list(tmp_path.glob("*drive*"))


def test_without_gdown_it_says_so(site, tmp_path):
    bare = tmp_path / "python"  # -S: without installed packages
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    site.files = {}
    code, said = download(tmp_path / "data", site, PYTHON=str(bare), MINIPLACES_DRIVE="some-id")
    assert code == 1 and "gdown is not installed" in said


def test_no_python_is_one_clear_line(tmp_path):
    code, said = download(tmp_path, None, PYTHON=str(tmp_path / "none"))
    assert code == 1 and "is not there or older than Python 3.8" in said


def test_it_parses_on_python_3_8():
    ast.parse((ROOT / "download_dataset.py").read_text(), feature_version=(3, 8))
