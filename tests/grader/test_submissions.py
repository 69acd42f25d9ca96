"""Finding student_code.py in what students hand in; a refused submission does no harm."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from grader.submissions import BOMB_BYTES, MAX_SOURCE, looks_like_one, read
from utils import UserError

SOURCE = b"ANSWER = 42\n"


def make_zip(path: Path | io.BytesIO, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def zipped(files: dict[str, bytes]) -> bytes:
    make_zip(file := io.BytesIO(), files)
    return file.getvalue()


def make_folder(root: Path, files: dict[str, bytes]) -> None:
    root.mkdir()
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


NESTINGS = {
    "at the root": {"student_code.py": SOURCE},
    "in code": {"code/student_code.py": SOURCE, "writeup/report.pdf": b"%PDF"},
    "deep": {"hw2/code/student_code.py": SOURCE, "hw2/main.py": b""},
    "spaces and Unicode": {"Übung 2 – Zoë/my code/student_code.py": SOURCE},
    "beside an old one": {"student_code.py": b"OLD = 1", "code/student_code.py": SOURCE},
    "beside a backup": {"hw2/student_code.py": SOURCE, "hw2/old/v1/student_code.py": b"OLD = 1"},
    "with the litter of macOS": {
        "hw2/student_code.py": SOURCE,
        "__MACOSX/hw2/._student_code.py": b"\0\5\x16\7",
        "hw2/._student_code.py": b"\0\5\x16\7",
        "hw2/.DS_Store": b"\0",
    },
    "another name": {"hw2/student_code (2).py": SOURCE, "hw2/main.py": b""},
    "in capitals": {"Code/Student_Code.PY": SOURCE},
    "the only .py file": {"hw2/answer.py": SOURCE, "hw2/report.txt": b""},
    "zip in zip": {"submission.zip": zipped({"hw2/code/student_code.py": SOURCE})},
    "zip in zip in zip": {"a.zip": zipped({"b.zip": zipped({"student_code.py": SOURCE})})},
}


@pytest.mark.parametrize("files", NESTINGS.values(), ids=NESTINGS)
@pytest.mark.parametrize("make", [make_zip, make_folder])
def test_every_nesting(tmp_path, make, files):
    path = tmp_path / ("Zoë's hw 2.zip" if make is make_zip else "Zoë's hw 2")
    make(path, files)
    assert looks_like_one(path)
    submission = read(path)
    assert submission.files[PurePosixPath("student_code.py")] == SOURCE
    submission.write(out := tmp_path / "out")
    assert (out / "student_code.py").read_bytes() == SOURCE


def test_a_lone_file(tmp_path):
    path = tmp_path / "lovelace_ada_4711_student_code-1.py"
    path.write_bytes(SOURCE)
    assert looks_like_one(path) and read(path).files == {PurePosixPath("student_code.py"): SOURCE}


def test_a_zip_made_on_windows(tmp_path):
    make_zip(tmp_path / "a.zip", {"hw2/code/student_code.py": SOURCE})
    data = (tmp_path / "a.zip").read_bytes().replace(b"hw2/code/", b"hw2\\code\\")
    (tmp_path / "a.zip").write_bytes(data)
    assert read(tmp_path / "a.zip").path == PurePosixPath("hw2/code/student_code.py")


def test_helpers_are_the_students_and_missing_ones_ours(tmp_path):
    files = {"code/student_code.py": SOURCE, "code/utils.py": b"OWN = 1", "code/x/y.py": b"Y = 1"}
    make_zip(tmp_path / "a.zip", files | {"elsewhere.py": b""})
    submission = read(tmp_path / "a.zip")
    submission.write(tmp_path / "out")
    assert (tmp_path / "out" / "utils.py").read_bytes() == b"OWN = 1"
    assert (tmp_path / "out" / "x" / "y.py").read_bytes() == b"Y = 1"
    assert b"PatchEmbed" in (tmp_path / "out" / "custom_blocks.py").read_bytes()
    assert not (tmp_path / "out" / "elsewhere.py").exists()


def test_a_different_second_file_is_named(tmp_path):
    make_zip(tmp_path / "a.zip", {"code/student_code.py": SOURCE, "old/student_code.py": b""})
    assert read(tmp_path / "a.zip").others == [PurePosixPath("old/student_code.py")]
    make_zip(tmp_path / "b.zip", {"code/student_code.py": SOURCE, "old/student_code.py": SOURCE})
    assert read(tmp_path / "b.zip").others == []


def test_the_digest_follows_the_contents(tmp_path):
    digests = set()
    for n, files in enumerate(
        (
            {"student_code.py": SOURCE},
            {"student_code.py": SOURCE + b"\n"},
            {"student_code.py": SOURCE, "utils.py": b""},
        )
    ):
        make_zip(tmp_path / f"{n}.zip", files)
        digests.add(read(tmp_path / f"{n}.zip").digest)
    make_folder(tmp_path / "again", {"hw2/student_code.py": SOURCE})
    assert len(digests) == 3 and read(tmp_path / "again").digest in digests


# ---- Refused ----------------------------------------------------------------------------------


def entry(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


BAD = {
    "leads out of it": {"student_code.py": SOURCE, "../evil.py": SOURCE},
    "leads out of it ": {"student_code.py": SOURCE, "/evil.py": SOURCE},
    "leads out of it  ": {"student_code.py": SOURCE, "code\\..\\..\\evil.py": SOURCE},
    "leads out of it   ": {"student_code.py": SOURCE, "C:\\evil.py": SOURCE},
    "is a bomb": {"student_code.py": SOURCE, "zeros.bin": bytes(BOMB_BYTES + 1)},
    "more than": {"student_code.py": bytes(MAX_SOURCE + 1) + os.urandom(2**17)},
    "holds no student_code.py": {"main.py": SOURCE, "utils.py": SOURCE},
    "a bomb": {"a.zip": zipped({"student_code.py": SOURCE, "z": bytes(BOMB_BYTES + 1)})},
}


@pytest.mark.parametrize(("reason", "files"), BAD.items(), ids=BAD)
def test_bad_zips_are_refused(tmp_path, reason, files):
    make_zip(tmp_path / "a.zip", files)
    with pytest.raises(UserError, match=reason.strip()):
        read(tmp_path / "a.zip")
    assert os.listdir(tmp_path) == ["a.zip"] and not Path("/evil.py").exists()


def test_a_zip_with_a_link_is_refused(tmp_path):
    link = entry("code/student_code.py", stat.S_IFLNK | 0o777)
    make_zip(tmp_path / "a.zip", {link: b"/etc/passwd", "student_code.py": SOURCE})
    with pytest.raises(UserError, match="a link"):
        read(tmp_path / "a.zip")


@pytest.mark.parametrize("cut", [10, 60, -30])
def test_a_damaged_zip_is_refused(tmp_path, cut):
    (tmp_path / "a.zip").write_bytes(zipped({"student_code.py": os.urandom(1000)})[:cut])
    with pytest.raises(UserError, match="damaged"):
        read(tmp_path / "a.zip")


def test_an_encrypted_zip_is_refused(tmp_path):
    data = bytearray(zipped({"student_code.py": SOURCE}))
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(signature) + offset] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match="encrypted"):
        read(tmp_path / "a.zip")


def test_links_and_pipes_in_folders_are_not_followed(tmp_path):
    (tmp_path / "secret.py").write_bytes(SOURCE)
    make_folder(tmp_path / "a", {"main.py": b"", "utils.py": b""})
    (tmp_path / "a" / "student_code.py").symlink_to(tmp_path / "secret.py")
    with pytest.raises(UserError, match="link"):
        read(tmp_path / "a")
    (tmp_path / "a" / "student_code.py").unlink()
    (tmp_path / "a" / "code").symlink_to(tmp_path)
    with pytest.raises(UserError, match="holds no"):
        read(tmp_path / "a")
    os.mkfifo(tmp_path / "a" / "student_code.py")
    with pytest.raises(UserError, match="no regular file"):
        read(tmp_path / "a")


@pytest.mark.parametrize("name", ["notes.txt", ".DS_Store", "grades.csv", ".git", "__MACOSX"])
def test_what_is_no_submission(tmp_path, name):
    (tmp_path / name).mkdir() if name in (".git", "__MACOSX") else (tmp_path / name).write_text("")
    assert not looks_like_one(tmp_path / name)
