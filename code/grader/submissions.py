"""Find student_code.py in what students hand in: a zip, a folder or a lone .py file.

Nothing is unpacked to the disk and no link is followed: the .py files are read into memory.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from utils import UserError

NAME = "student_code.py"
CODE = Path(__file__).resolve().parents[1]
MAX_SOURCE = 2**20  # bytes of one .py file
MAX_SOURCES, MAX_ZIPS = 500, 10  # .py files; zips within one
MAX_TOTAL = 2**25  # bytes of all .py files
MAX_NESTED = 2**26  # bytes of a zip within a zip
MAX_DEPTH = 2  # zips within zips within the zip
BOMB_BYTES, BOMB_RATIO = 2**26, 100  # a zip that unpacks to more than both is refused
IGNORED = {"__MACOSX", "__pycache__", "site-packages", "node_modules"}

Files = dict[PurePosixPath, bytes]
Entry = tuple[PurePosixPath, int, Callable[[], bytes]]  # path, size, read


@dataclass(frozen=True)
class Submission:
    """The .py files of the folder that holds student_code.py, by their path below it."""

    files: Files
    path: PurePosixPath  # of student_code.py, in the submission
    others: list[PurePosixPath] = field(default_factory=list)  # different files of that name

    @property
    def digest(self) -> str:
        """SHA-256 of all names and contents."""
        content = hashlib.sha256()
        for path, data in sorted(self.files.items()):
            content.update(f"{path}\0{len(data)}\0".encode(errors="surrogateescape") + data)
        return content.hexdigest()

    def write(self, folder: Path) -> None:
        """Write the files, and the course's helper modules that are missing among them."""
        helpers = {PurePosixPath(p.name): p for p in (*CODE.glob("custom_*.py"), CODE / "utils.py")}
        files = {name: path.read_bytes() for name, path in helpers.items()} | self.files
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)


def looks_like_one(path: Path) -> bool:
    """Return True for a zip, a folder or a .py file that is not hidden."""
    if path.name.startswith(".") or path.name in IGNORED:
        return False
    return path.is_dir() or path.suffix.lower() in (".zip", ".py")


def read(path: Path) -> Submission:
    """Read a submission.

    Raises:
        UserError: it holds no student_code.py, is damaged, encrypted or a bomb, holds a link or
            a path that leads out of it, or cannot be read.
    """
    try:
        if path.is_symlink():
            raise UserError("it is a link")
        if path.is_dir():
            files = _collect(_folder_entries(path), MAX_DEPTH)
        elif path.suffix.lower() == ".py":
            entry = PurePosixPath(NAME), path.stat().st_size, lambda: _read_file(path)
            files = _collect([entry], 0)
        else:
            with path.open("rb") as file:
                files = _read_zip(file, path.stat().st_size, MAX_DEPTH)
    except OSError as e:
        raise UserError(f"it cannot be read: {e.strerror or e}") from None
    return _choose(files)


def _choose(files: Files) -> Submission:
    """Take the student_code.py in a folder named code, or else the one nearest to the top."""
    candidates = _candidates(files)
    if not candidates:
        raise UserError(f"it holds no {NAME}")
    candidates.sort(key=lambda path: (path.parent.name.lower() != "code", len(path.parts), path))
    path = candidates[0]
    others = [other for other in candidates[1:] if files[other] != files[path]]
    near = {p.relative_to(path.parent): d for p, d in files.items() if path.parent in p.parents}
    near.pop(PurePosixPath(path.name))
    return Submission(near | {PurePosixPath(NAME): files[path]}, path, others)


def _candidates(files: Files) -> list[PurePosixPath]:
    """Files named student_code.py; or whose name holds student_code; or a single .py file."""
    exact = [path for path in files if path.name.lower() == NAME]
    similar = [path for path in files if NAME[:-3] in path.name.lower()]
    return exact or similar or (list(files) if len(files) == 1 else [])


def _wanted(path: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") or part in IGNORED for part in path.parts)
    return not hidden and path.suffix.lower() in (".py", ".zip")


def _collect(entries: Iterable[Entry], depth: int) -> Files:
    """The .py files of a zip or folder; without student_code.py, those of the zips in it, too."""
    entries = [entry for entry in entries if _wanted(entry[0])]
    zips = [entry for entry in entries if entry[0].suffix.lower() == ".zip"]
    sources = [entry for entry in entries if entry not in zips]
    if len(sources) > MAX_SOURCES:
        raise UserError(f"it holds {len(sources)} .py files, more than {MAX_SOURCES}")
    if sum(size for _, size, _ in sources) > MAX_TOTAL:
        raise UserError(f"its .py files have more than {MAX_TOTAL:,} bytes")
    files = {path: _read(path, size, read, MAX_SOURCE) for path, size, read in sources}
    if depth > 0 and not any(path.name.lower() == NAME for path in files):
        for path, size, read in zips[:MAX_ZIPS]:
            data = _read(path, size, read, MAX_NESTED)
            inner = _read_zip(io.BytesIO(data), size, depth - 1)
            files |= {path.with_suffix("") / name: content for name, content in inner.items()}
    return files


def _read(path: PurePosixPath, size: int, read: Callable[[], bytes], limit: int) -> bytes:
    if size > limit:
        raise UserError(f"{path} has {size:,} bytes, more than {limit:,}")
    return read()


# ---- Folders ----------------------------------------------------------------------------------


def _folder_entries(folder: Path) -> Iterator[Entry]:
    for parent, _, names in os.walk(folder):
        for file in (Path(parent) / name for name in names):
            path = PurePosixPath(file.relative_to(folder).as_posix())
            yield path, file.lstat().st_size, functools.partial(_read_file, file)


def _read_file(path: Path) -> bytes:
    """A regular file; a pipe would never end, and a link may lead anywhere."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise UserError(f"{path.name} is a link or no regular file")
    return path.read_bytes()


# ---- Zips -------------------------------------------------------------------------------------


def _read_zip(file: io.BufferedIOBase, size: int, depth: int) -> Files:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [info for info in archive.infolist() if not info.is_dir()]
            _refuse_bomb(sum(info.file_size for info in entries), size)
            return _collect(_zip_entries(archive, entries), depth)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as e:
        raise UserError(f"the zip is damaged: {e}") from None
    except RuntimeError as e:  # a password is asked for
        raise UserError(f"the zip cannot be read: {e}") from None


def _refuse_bomb(unpacked: int, size: int) -> None:
    if unpacked > max(BOMB_BYTES, BOMB_RATIO * size):
        raise UserError(f"the zip is a bomb: {size:,} bytes unpack to {unpacked:,}")


def _zip_entries(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> Iterator[Entry]:
    for info in entries:
        yield _inside(info), info.file_size, functools.partial(archive.read, info)


def _inside(info: zipfile.ZipInfo) -> PurePosixPath:
    """The entry's path, with the backslashes of Windows turned."""
    path = PurePosixPath(info.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", str(path)):
        raise UserError(f"the zip holds a path that leads out of it: {info.filename}")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(f"the zip holds a link or a special file: {info.filename}")
    return path
