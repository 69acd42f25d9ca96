#!/bin/sh
# Download MiniPlaces (about 0.5 GB, 120,000 images of 128x128) into data/:
#
#     sh download_dataset.sh
#
# Leaves data/images, data/objects, data/train.txt and data/val.txt. It may be interrupted at any
# moment and run again: it goes on where it stopped, and says so when nothing is left to do.
# Behind a closed network, put the archive at data/data.tar.gz by hand and run it: it is used first.
#
# Needs Python 3.8 or newer (.venv's if there is one, else python3; PYTHON=... chooses another).
# Google Drive, the last source, also needs gdown, which `make demo` installs.
#
# Variables, all optional:
#   MINIPLACES_DIR        where to put everything (default: data beside this script)
#   MINIPLACES_URLS       addresses of the archive, in order of preference
#   MINIPLACES_DRIVE      the archive's Google Drive id, tried last ('' = do not)
#   MINIPLACES_LABELS     address of the folder that has train.txt and val.txt
#   MINIPLACES_MIN_BYTES  an archive smaller than this is refused
#   MINIPLACES_COUNTS     the least number of train, val and test images
#   MINIPLACES_TIMEOUT    seconds of silence after which a connection counts as lost
#   MINIPLACES_WAIT       seconds before the second try; later ones wait longer

cd "$(dirname "$0")" || exit 1
[ -n "$PYTHON" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; } || PYTHON=python3
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || {
    echo "download_dataset.sh: $PYTHON is not there or older than Python 3.8;" \
        "try: PYTHON=/path/to/python3 sh download_dataset.sh" >&2
    exit 1
}
exec "$PYTHON" - <<'PYTHON_PART'
import gzip
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from functools import partial
from pathlib import Path, PurePosixPath

SPLITS = ("train", "val", "test")
DATA = Path(os.environ.get("MINIPLACES_DIR", "data"))
MIT = "places.csail.mit.edu/miniplaces/data/data.tar.gz"
URLS = os.environ.get("MINIPLACES_URLS", f"https://{MIT} http://{MIT}").split()
DRIVE = os.environ.get("MINIPLACES_DRIVE", "16GYHdSWS3iMYwMPv5FpeDZN2rH7PR0F2")
GITHUB = "https://raw.githubusercontent.com/CSAILVision/miniplaces/master/data"
LABELS = os.environ.get("MINIPLACES_LABELS", GITHUB)
MIN_BYTES = int(os.environ.get("MINIPLACES_MIN_BYTES", 200_000_000))
COUNTS = [int(n) for n in os.environ.get("MINIPLACES_COUNTS", "100000 10000 10000").split()]
TIMEOUT = float(os.environ.get("MINIPLACES_TIMEOUT", 30))
WAIT = float(os.environ.get("MINIPLACES_WAIT", 2))
TRIES = 3  # in a row without a new byte
CHUNK = 1 << 16
BLOCK = 4096  # what file systems round a small file up to


class Stop(Exception):
    """Nothing more can be done; the message is the line the user is shown."""


class Failed(Exception):
    """This source is of no use; the next one may be."""


class Dropped(Exception):
    """The connection broke; trying again may help."""


def say(text):
    print(text, flush=True)


def megabytes(n):
    return f"{n / 1e6:,.1f} MB"


def size(path):
    return path.stat().st_size if path.exists() else 0


# ---- One file over HTTP: PART grows, PART.json says which version of the file it is a part of


def fetch(url, part, check):
    """Download url into part, going on from what is there; several tries."""
    idle = 0
    while idle < TRIES:
        have = size(part)
        try:
            return receive(url, part, check)
        except Dropped as e:
            idle = 0 if size(part) > have else idle + 1
            reason = str(e)
            time.sleep(WAIT * idle)
    kept = f"; the first {megabytes(size(part))} are kept in {part}" if size(part) else ""
    raise Failed(reason + kept)


def receive(url, part, check):
    """One connection. Nothing of part is given up before the reply looks like the right file."""
    have, note = size(part), read_note(part)
    if note and have == note["total"]:
        return
    with connect(url, have, note) as reply:
        start, total = placed(reply)
        if start and (start != have or total != note["total"]):
            note_path(part).unlink()  # so the next try asks for the whole file
            raise Dropped("the server answered with another range than asked for")
        data = read(reply)
        if not data:
            raise Dropped(f"wrong length: {start:,} of {total or 1:,} bytes came")
        check(b"" if start else data, total)
        need_space(3 * (total or 0) - start)  # unpacked, images take about twice their archive
        if start == 0:
            part.write_bytes(b"")
            write_note(part, reply, total)
        progress = Progress(total)
        with part.open("ab") as file:
            while data:
                file.write(data)
                progress.show(file.tell())
                data = read(reply)
    if total is not None and size(part) != total:
        raise Dropped(f"wrong length: {size(part):,} of {total:,} bytes came")


def connect(url, have, note):
    headers = {"User-Agent": "miniplaces-download", "Accept-Encoding": "identity"}
    if have and note:
        headers["Range"] = f"bytes={have}-"
        if note["version"]:
            headers["If-Range"] = note["version"]  # a changed file comes whole, not spliced
    try:
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416 and "Range" in headers:  # the part is longer than the file: no part of it
            return connect(url, 0, note)
        line = f"the server says {e.code} {e.reason}"
        raise (Dropped if e.code in (408, 429) or e.code >= 500 else Failed)(line) from None
    except (OSError, http.client.HTTPException) as e:
        raise Dropped(f"no connection ({getattr(e, 'reason', None) or e!r})") from None
    except ValueError as e:
        raise Failed(f"not an address: {e}") from None


def placed(reply):
    """Where the reply's first byte lies in the file, and the file's length (None = not told)."""
    if reply.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
        return (int(match[1]), int(match[2])) if match else (-1, None)
    length = reply.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def read(reply):
    try:
        return reply.read1(CHUNK)  # read1: what came before a break is not lost
    except (OSError, http.client.HTTPException) as e:
        raise Dropped(f"the connection broke ({e!r})") from None


def note_path(part):
    return part.with_name(part.name + ".json")


def read_note(part):
    """{"version": ..., "total": ...}, or {} where part must be downloaded from its start."""
    try:
        note = json.loads(note_path(part).read_text())
        return {"version": note["version"], "total": note["total"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_note(part, reply, total):
    etag = reply.headers.get("ETag", "")
    version = reply.headers.get("Last-Modified") if etag[:2] in ("", "W/") else etag
    note_path(part).write_text(json.dumps({"version": version, "total": total}))


def remove(part):
    for path in (part, note_path(part)):
        if path.exists():
            path.unlink()


class Progress:
    """A line that counts up on a terminal; otherwise one for each 50 MB."""

    def __init__(self, total):
        self.total, self.shown = total, 0

    def show(self, done):
        line = f"  {megabytes(done)}" + (f" of {megabytes(self.total)}" if self.total else "")
        if sys.stdout.isatty():
            end = "\n" if done == self.total else ""
            print(f"\r{line}  ", end=end, flush=True)
        elif done // 50_000_000 != self.shown:
            self.shown = done // 50_000_000
            say(line)


# ---- The archive: is it one, is it safe, is it whole; unpack it


def check_archive(head, total):
    """Refuse what cannot be the archive by its first bytes or its length."""
    if not b"\x1f\x8b".startswith(head[:2]):
        page = head.lstrip()[:1] == b"<"
        raise Failed("a web page came instead of the archive" if page else "not a gzip archive")
    if total is not None and total < MIN_BYTES:
        raise Failed(f"only {total:,} bytes; the archive has at least {MIN_BYTES:,}")


def need_space(wanted):
    free = shutil.disk_usage(DATA).free
    if free < wanted:
        raise Stop(
            f"too little disk: {megabytes(wanted)} needed, {megabytes(free)} free in {DATA}; "
            "make room, or choose another place with MINIPLACES_DIR"
        )


def members(archive):
    """Yield (tar, member) for each file and folder, and read on to the end: gzip's checksum."""
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                check_member(member)
                yield tar, member
            while stream.read(CHUNK):
                pass
    except (tarfile.TarError, EOFError, ValueError, zlib.error, gzip.BadGzipFile) as e:
        raise Failed(f"the archive is damaged or cut off ({e})") from None


def check_member(member):
    name = member.name
    if not (member.isreg() or member.isdir()):
        raise Failed(f"refused: the archive holds a link or a device, {name!a}")
    if name.startswith("/") or ".." in name.split("/") or re.search(r"[\\:\0]", name):
        raise Failed(f"refused: the archive holds a path that climbs out of it, {name!a}")


def split_of(name):
    """The split an archive's image belongs to, None for anything else."""
    parts = PurePosixPath(name).parts
    parts = parts[1:] if parts[:1] == ("data",) else parts
    image = len(parts) > 2 and parts[0] == "images" and is_image(parts[-1])
    return parts[1] if image and parts[1] in SPLITS else None


def is_image(name):
    return name.lower().endswith((".jpg", ".jpeg")) and not name.startswith(".")


def inspect(archive):
    """Read the archive through; return the bytes that its files will take on disk."""
    with archive.open("rb") as file:
        check_archive(file.read(CHUNK), size(archive))
    say("Checking the archive ...")
    counts, unpacked = dict.fromkeys(SPLITS, 0), 0
    for _, member in members(archive):
        unpacked += -(-member.size // BLOCK) * BLOCK
        if member.isreg() and split_of(member.name):
            counts[split_of(member.name)] += 1
    if too_few(counts):
        raise Failed(f"the archive has too few images: {too_few(counts)}")
    return unpacked


def too_few(counts):
    lacking = [(s, counts[s], n) for s, n in zip(SPLITS, COUNTS) if counts[s] < n]  # noqa: B905
    return ", ".join(f"{have:,} of {n:,} for {split}" for split, have, n in lacking)


def unpack(archive):
    """Into a temporary folder first, so that data/images is whole from the moment it exists."""
    say("Unpacking ...")
    temporary = DATA / ".unpacking"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for tar, member in members(archive):
            target = temporary / member.name
            folder = target if member.isdir() else target.parent
            folder.mkdir(parents=True, exist_ok=True)
            if member.isreg():  # the bytes only: no owner, mode or time of the archive's choosing
                with target.open("wb") as file:
                    shutil.copyfileobj(tar.extractfile(member), file)
        inner = temporary if (temporary / "images").is_dir() else temporary / "data"
        if (inner / "objects").is_dir() and not (DATA / "objects").exists():
            os.replace(inner / "objects", DATA / "objects")
        os.replace(inner / "images", DATA / "images")  # last: it is what says "complete"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- What there is, what is missing, and where to get it


def count_images():
    walks = {split: os.walk(DATA / "images" / split) for split in SPLITS}
    return {s: sum(is_image(f) for _, _, files in w for f in files) for s, w in walks.items()}


def have_images():
    images = DATA / "images"
    if not images.exists() or not any(images.iterdir()):
        return False
    if too_few(count_images()):
        raise Stop(
            f"{images} is there but incomplete ({too_few(count_images())}): move or delete it, "
            "then run this again"
        )
    return True


def check_labels(path, least):
    """A label file: one `path label` per line, at least as many as there are images."""
    lines = path.read_bytes().splitlines()
    bad = [i for i, line in enumerate(lines, 1) if not re.fullmatch(rb"\S+\s+\d+\s*", line)]
    if bad:
        raise Failed(f"line {bad[0]} is not `path label`")
    if len(lines) < least:
        raise Failed(f"{len(lines):,} lines of {least:,}")


def check_label_head(head, total):
    if head.lstrip()[:1] == b"<":
        raise Failed("a web page came instead of the label file")


def get_labels(split, least):
    path = DATA / f"{split}.txt"
    if path.exists():
        try:
            return check_labels(path, least)
        except Failed as e:
            raise Stop(f"{path}: {e}; move or delete it, then run this again") from None
    part = path.with_name(path.name + ".part")
    say(f"Labels: {LABELS}/{path.name}")
    fetch(f"{LABELS}/{path.name}", part, check_label_head)
    try:
        check_labels(part, least)
    except Failed:
        remove(part)
        raise
    os.replace(part, path)
    return remove(part)


def from_drive(target):
    """gdown resumes by itself and leaves target only when it has the whole file."""
    if target.exists():
        return
    try:
        import gdown
    except ImportError:
        raise Failed("gdown is not installed (pip install gdown, or make demo)") from None
    url = DRIVE if "://" in DRIVE else f"https://drive.google.com/uc?id={DRIVE}"
    try:
        got = gdown.download(url, str(target), quiet=not sys.stdout.isatty(), resume=True)
    except Exception as e:  # gdown passes on whatever requests and Drive's pages come to
        raise Failed("gdown: " + (" ".join(str(e).split()) or type(e).__name__)[:300]) from None
    if not got or not target.exists():
        raise Failed("gdown got no file")


def sources():
    """(name, file, how to get the file) of each place the archive may come from, best first."""
    by_hand, part = DATA / "data.tar.gz", DATA / "data.tar.gz.part"
    if by_hand.exists():
        yield str(by_hand), by_hand, lambda: None
    for url in URLS:
        yield url, part, partial(fetch, url, part, check_archive)
    if DRIVE:
        drive = DATA / "data.tar.gz.drive"
        yield f"Google Drive {DRIVE}", drive, partial(from_drive, drive)


def get_images():
    for name, archive, get in sources():
        ours = archive.name != "data.tar.gz"
        say(f"Archive: {name}")
        try:
            get()
            try:
                need_space(inspect(archive))
                unpack(archive)
            except Failed:
                if ours:
                    remove(archive)  # whole but no good: going on from it would not mend it
                raise
            return remove(archive) if ours else None
        except Failed as e:
            say(f"  failed: {e}")
    raise Stop(
        "no source gave the archive (the lines above say why). Run this again to go on, or put "
        f"the archive at {DATA / 'data.tar.gz'} by hand and run this again"
    )


def only_one():
    """Hold a lock while this runs: two downloads into one .part would spoil it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    lock = (DATA / ".download.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Stop(f"another download into {DATA} is running") from None
    return lock


def main():
    system = "/etc/ssl/cert.pem"
    if not ssl.get_default_verify_paths().cafile and os.path.exists(system):
        os.environ["SSL_CERT_FILE"] = system  # python.org's macOS build brings no certificates
    DATA.mkdir(parents=True, exist_ok=True)
    lock = only_one()  # kept until the end  # noqa: F841
    problems = []
    for split, least in zip(SPLITS[:2], COUNTS):  # noqa: B905
        try:
            get_labels(split, least)
        except Failed as e:
            problems.append(f"no {split}.txt: {e}")
    fresh = not have_images()
    if fresh:
        get_images()
        have_images()  # raises unless they are all there
    remove(DATA / "data.tar.gz.part")  # of a run that was killed with all but this done
    if problems:
        raise Stop("; ".join(problems) + ". Run this again to try once more")
    counts = ", ".join(f"{n:,} {split}" for split, n in count_images().items())
    say(f"{'Done' if fresh else 'Already complete'}: {counts} images in {DATA / 'images'}")


try:
    main()
except Stop as e:
    sys.exit(f"download_dataset.sh: {e}")
except OSError as e:
    place = f": {e.filename}" if e.filename else ""
    sys.exit(f"download_dataset.sh: {e.strerror}{place}. What came is kept; run it again to go on")
except KeyboardInterrupt:
    print("\ndownload_dataset.sh: interrupted; run it again to go on", file=sys.stderr)
    sys.exit(130)
PYTHON_PART
