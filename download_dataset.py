"""Download MiniPlaces into data/; run it as `sh download_dataset.sh`, which says how.

It needs only Python 3.8, and resumes where an earlier run was interrupted:

1. train.txt and val.txt from the official repository;
2. the archive, from the first source that has it, into a .part file;
3. check: every member's path, gzip's checksum, the number of images;
4. unpack into a temporary folder, then rename: data/images is complete from the moment it exists.
"""

import argparse
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
    """Nothing more can be done; the message is the line that the user sees."""


class Failed(Exception):
    """This source has failed; the next one may work."""


class Dropped(Exception):
    """The connection broke; another try may help."""


def say(text):
    """Print a line immediately."""
    print(text, flush=True)


def megabytes(n):
    """n bytes as text, in MB."""
    return f"{n / 1e6:,.1f} MB"


def size(path):
    """Bytes in a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


# ---- One file over HTTP: it grows in PART; PART.json records its version and total size


def fetch(url, part, check):
    """Download url into part, resuming from what is there.

    check: called with the first bytes and the total size; raises Failed if they cannot be right.
    Raises Failed after TRIES tries in a row without a new byte.
    """
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
    """One connection. Part is kept until the reply looks like the right file."""
    have, note = size(part), read_note(part)
    if note and have == note["total"]:
        return
    with connect(url, have, note) as reply:
        start, total = position(reply)
        if start and (start != have or total != note["total"]):
            note_path(part).unlink()  # so the next try asks for the whole file
            raise Dropped("the server answered with another range than asked for")
        data = read(reply)
        if not data:
            raise Dropped(f"wrong length: {start:,} of {total or 1:,} bytes came")
        check(b"" if start else data, total)
        need_space(3 * (total or 0) - start)  # unpacked, the images are twice as large
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
    """Open url, for the bytes after the first `have` if they are still of the server's version."""
    headers = {"User-Agent": "miniplaces-download", "Accept-Encoding": "identity"}
    if have and note:
        headers["Range"] = f"bytes={have}-"
        if note["version"]:
            headers["If-Range"] = note["version"]  # a file that has changed comes whole
    try:
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416 and "Range" in headers:  # part is longer than the file
            return connect(url, 0, note)
        line = f"the server says {e.code} {e.reason}"
        raise (Dropped if e.code in (408, 429) or e.code >= 500 else Failed)(line) from None
    except (OSError, http.client.HTTPException) as e:
        raise Dropped(f"no connection ({getattr(e, 'reason', None) or e!r})") from None
    except ValueError as e:
        raise Failed(f"not an address: {e}") from None


def position(reply):
    """Where the reply's first byte lies in the file, and the file's size (None = unknown)."""
    if reply.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
        return (int(match[1]), int(match[2])) if match else (-1, None)
    length = reply.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def read(reply):
    """The next bytes, b"" at the end."""
    try:
        return reply.read1(CHUNK)  # unlike read, keeps what came before a break
    except (OSError, http.client.HTTPException) as e:
        raise Dropped(f"the connection broke ({e!r})") from None


def note_path(part):
    """The file that describes part."""
    return part.with_name(part.name + ".json")


def read_note(part):
    """{"version": ..., "total": ...}, or {} where part must be downloaded from its start."""
    try:
        note = json.loads(note_path(part).read_text())
        return {"version": note["version"], "total": note["total"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_note(part, reply, total):
    """Record the version and size of the file; a weak ETag (W/) identifies no bytes."""
    etag = reply.headers.get("ETag", "")
    version = reply.headers.get("Last-Modified") if etag[:2] in ("", "W/") else etag
    note_path(part).write_text(json.dumps({"version": version, "total": total}))


def remove(part):
    """Delete part and its note."""
    for path in (part, note_path(part)):
        if path.exists():
            path.unlink()


class Progress:
    """A line that is updated on a terminal; elsewhere one line per 50 MB."""

    def __init__(self, total):
        self.total, self.shown = total, 0

    def show(self, done):
        """Report that `done` bytes are there."""
        line = f"  {megabytes(done)}" + (f" of {megabytes(self.total)}" if self.total else "")
        if sys.stdout.isatty():
            end = "\n" if done == self.total else ""
            print(f"\r{line}  ", end=end, flush=True)
        elif done // 50_000_000 != self.shown:
            self.shown = done // 50_000_000
            say(line)


# ---- The archive: check it, unpack it


def check_archive(head, total):
    """Raise Failed if the first bytes or the size cannot be the archive's."""
    if not b"\x1f\x8b".startswith(head[:2]):
        page = head.lstrip()[:1] == b"<"
        raise Failed("a web page came instead of the archive" if page else "not a gzip archive")
    if total is not None and total < MIN_BYTES:
        raise Failed(f"only {total:,} bytes; the archive has at least {MIN_BYTES:,}")


def need_space(wanted):
    """Raise Stop if fewer bytes are free."""
    free = shutil.disk_usage(DATA).free
    if free < wanted:
        raise Stop(
            f"too little disk: {megabytes(wanted)} needed, {megabytes(free)} free in {DATA}; "
            "make room, or choose another place with MINIPLACES_DIR"
        )


def members(archive):
    """Yield (tar, member) for each file and folder; read to the end, where gzip's checksum is."""
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
    """Raise Failed for a link, a device, or a path that leaves the folder."""
    name = member.name
    if not (member.isreg() or member.isdir()):
        raise Failed(f"refused: the archive holds a link or a device, {name!a}")
    if name.startswith("/") or ".." in name.split("/") or re.search(r"[\\:\0]", name):
        raise Failed(f"refused: the archive holds a path that climbs out of it, {name!a}")


def split_of(name):
    """The split that a member of the archive is an image of; None for anything else."""
    parts = PurePosixPath(name).parts
    parts = parts[1:] if parts[:1] == ("data",) else parts
    image = len(parts) > 2 and parts[0] == "images" and is_image(parts[-1])
    return parts[1] if image and parts[1] in SPLITS else None


def is_image(name):
    """Whether a file name is that of a JPEG, and not hidden."""
    return name.lower().endswith((".jpg", ".jpeg")) and not name.startswith(".")


def inspect(archive):
    """Read the whole archive, raise Failed if it is wrong; return its unpacked bytes on disk."""
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
    """Which splits have too few images, as text; "" if none has."""
    lacking = [(s, counts[s], n) for s, n in zip(SPLITS, COUNTS) if counts[s] < n]  # noqa: B905
    return ", ".join(f"{have:,} of {n:,} for {split}" for split, have, n in lacking)


def unpack(archive):
    """Unpack into a temporary folder, then move images/ and objects/ to their places."""
    say("Unpacking ...")
    temporary = DATA / ".unpacking"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for tar, member in members(archive):
            target = temporary / member.name
            folder = target if member.isdir() else target.parent
            folder.mkdir(parents=True, exist_ok=True)
            if member.isreg():  # only the bytes: no owner, mode or time
                with target.open("wb") as file:
                    shutil.copyfileobj(tar.extractfile(member), file)
        inner = temporary if (temporary / "images").is_dir() else temporary / "data"
        if (inner / "objects").is_dir() and not (DATA / "objects").exists():
            os.replace(inner / "objects", DATA / "objects")
        os.replace(inner / "images", DATA / "images")  # last: it means "complete"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- What is there, what is missing, where to get it


def count_images():
    """{split: number of images below data/images}."""
    walks = {split: os.walk(DATA / "images" / split) for split in SPLITS}
    return {s: sum(is_image(f) for _, _, files in w for f in files) for s, w in walks.items()}


def have_images():
    """Whether data/images is complete; raise Stop if it is there and incomplete."""
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
    """Raise Failed unless each line is `path label` and there are at least `least` of them."""
    lines = path.read_bytes().splitlines()
    bad = [i for i, line in enumerate(lines, 1) if not re.fullmatch(rb"\S+\s+\d+\s*", line)]
    if bad:
        raise Failed(f"line {bad[0]} is not `path label`")
    if len(lines) < least:
        raise Failed(f"{len(lines):,} lines of {least:,}")


def check_label_head(head, total):
    """Raise Failed if the first bytes are a web page's."""
    if head.lstrip()[:1] == b"<":
        raise Failed("a web page came instead of the label file")


def get_labels(split, least):
    """Download a label file unless it is there; one that is there is never changed."""
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
    """Download from Google Drive; gdown resumes, and leaves target only when it is whole."""
    if target.exists():
        return
    try:
        import gdown
    except ImportError:
        raise Failed("gdown is not installed (pip install gdown, or make demo)") from None
    url = DRIVE if "://" in DRIVE else f"https://drive.google.com/uc?id={DRIVE}"
    try:
        got = gdown.download(url, str(target), quiet=not sys.stdout.isatty(), resume=True)
    except Exception as e:  # gdown lets through whatever requests and Drive's pages raise
        raise Failed("gdown: " + (" ".join(str(e).split()) or type(e).__name__)[:300]) from None
    if not got or not target.exists():
        raise Failed("gdown got no file")


def sources():
    """Yield (name, file, function that gets the file) for each source of the archive."""
    by_hand, part = DATA / "data.tar.gz", DATA / "data.tar.gz.part"
    if by_hand.exists():
        yield str(by_hand), by_hand, lambda: None
    for url in URLS:
        yield url, part, partial(fetch, url, part, check_archive)
    if DRIVE:
        drive = DATA / "data.tar.gz.drive"
        yield f"Google Drive {DRIVE}", drive, partial(from_drive, drive)


def get_images():
    """Get the archive from the first source that works, and unpack it."""
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
                    remove(archive)  # complete and wrong: resuming would not help
                raise
            return remove(archive) if ours else None
        except Failed as e:
            say(f"  failed: {e}")
    raise Stop(
        "no source gave the archive (the lines above say why). Run this again to resume, or put "
        f"the archive at {DATA / 'data.tar.gz'} by hand and run this again"
    )


def only_one():
    """Take a lock while the returned file is open: two downloads would mix in one .part."""
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


def download():
    """Get what is missing; raise Stop if something still is at the end."""
    DATA.mkdir(parents=True, exist_ok=True)
    lock = only_one()  # until the end  # noqa: F841
    problems = []
    for split, least in zip(SPLITS[:2], COUNTS):  # noqa: B905
        try:
            get_labels(split, least)
        except Failed as e:
            problems.append(f"no {split}.txt: {e}")
    missing = not have_images()
    if missing:
        get_images()
        have_images()  # raises Stop unless all are there
    remove(DATA / "data.tar.gz.part")  # of a run that was killed just before its end
    if problems:
        raise Stop("; ".join(problems) + ". Run this again to try once more")
    counts = ", ".join(f"{n:,} {split}" for split, n in count_images().items())
    say(f"{'Done' if missing else 'Already complete'}: {counts} images in {DATA / 'images'}")


def main():
    """Run the download; every error is one line."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    certificates = "/etc/ssl/cert.pem"
    if not ssl.get_default_verify_paths().cafile and os.path.exists(certificates):
        os.environ["SSL_CERT_FILE"] = certificates  # python.org's macOS build brings none
    try:
        download()
    except Stop as e:
        sys.exit(f"download_dataset.sh: {e}")
    except OSError as e:
        place = f": {e.filename}" if e.filename else ""
        sys.exit(
            f"download_dataset.sh: {e.strerror}{place}. What came is kept; run it again to resume"
        )
    except KeyboardInterrupt:
        print("\ndownload_dataset.sh: interrupted; run it again to resume", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
