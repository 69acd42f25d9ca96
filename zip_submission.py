"""Pack code/, writeup/ and results/ into submission.zip.

    python zip_submission.py

Data, logs, models, caches, hidden files and links out of the project are left out; one line names
each. No zip is written if a required file is missing, or if Python code contains a path that
exists only on one computer. The same files always give the same bytes.
"""

from __future__ import annotations

import signal

INTERRUPT = signal.getsignal(signal.SIGINT)
if __name__ == "__main__":  # Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import ast
import os
import re
import runpy
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

FOLDERS = ("code", "writeup", "results")
REQUIRED = (
    "code/student_code.py",
    "code/main.py",
    "code/custom_blocks.py",
    "code/custom_dataloader.py",
    "code/custom_transforms.py",
    "code/utils.py",
)
STUDENT_TEXT = "code/deepvision/reporting/student_text.py"
UNWANTED_FOLDERS = {"data": "data", "logs": "logs", "__pycache__": "cache"}
UNWANTED_FILES = {
    "model": (".pth", ".pt", ".pth.tar", ".ckpt", ".safetensors", ".onnx", ".pkl", ".h5"),
    "data": (".tar", ".npy", ".npz", ".gz", ".tgz", ".zip"),
    "log": (".log",),
    "cache": (".pyc", ".pyo"),
}
TEXT = {".cfg", ".ini", ".ipynb", ".json", ".md", ".sh", ".tex", ".toml", ".txt", ".yaml", ".yml"}

# Home directory, mounted disk or Windows drive; not the end of a URL or of a longer path
LOCAL_PATH = re.compile(
    r"(?<![\w.:/-])/(?:home|Users|root|mnt|media|scratch|Volumes|kaggle|content/drive)/\w[^\s'\"]*"
    r"|(?<![\w\\])[A-Za-z]:[\\/]+\w[\w .-]*[\\/][^\s'\"]*"
)


class Refused(Exception):
    """The submission is not valid; each argument is one line of the message."""


def collect(root: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The files to pack, and the reasons for those left out, both by their name in the zip."""
    packed, excluded = {}, {}
    for top in FOLDERS:
        if (root / top).is_symlink():
            excluded[top] = "link"
        elif (root / top).is_dir():
            collect_folder(root, root / top, packed, excluded)
    return dict(sorted(packed.items())), excluded


def collect_folder(
    root: Path, folder: Path, packed: dict[str, Path], excluded: dict[str, str]
) -> None:
    """Add the contents of `folder`, recursively, to `packed` or `excluded`."""
    for path in folder.iterdir():
        name = path.relative_to(root).as_posix()
        if reason := unwanted(path, root):
            excluded[name] = reason
        elif path.is_dir():
            collect_folder(root, path, packed, excluded)
        else:
            packed[name] = path


def unwanted(path: Path, root: Path) -> str | None:
    """The reason to leave a file or folder out; None if it is packed."""
    if not path.is_symlink():
        return unwanted_kind(path)
    target = path.resolve()
    if not target.is_file() or not any(target.is_relative_to(root / top) for top in FOLDERS):
        return "link to a folder, to nothing or out of the project"
    # a link is packed as its target, if the target would be packed
    steps = [target, *target.parents][: len(target.relative_to(root).parts) - 1]
    return next((kind for step in [path, *steps] if (kind := unwanted_kind(step))), None)


def unwanted_kind(path: Path) -> str | None:
    """The reason that follows from the name and kind of a file or folder, links aside."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        if (path / "__init__.py").exists():  # a package, such as deepvision/data
            return None
        return "cache" if (path / "pyvenv.cfg").exists() else UNWANTED_FOLDERS.get(path.name)
    if not path.is_file():
        return "not a file"
    if path.name.startswith("events.out.tfevents"):
        return "log"
    kinds = (k for k, suffixes in UNWANTED_FILES.items() if path.name.lower().endswith(suffixes))
    return next(kinds, None)


def check_required(packed: dict[str, Path], excluded: dict[str, str]) -> list[str]:
    """One error for each required file that is missing."""
    missing = [name for name in REQUIRED if name not in packed]
    return [f"{n} is missing" + (f" ({excluded[n]})" if n in excluded else "") for n in missing]


def check_python(name: str, source: bytes) -> Iterator[str]:
    """Errors for local paths in strings; comments and docstrings may contain them."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as e:
        yield f"{name}:{getattr(e, 'lineno', None) or 1}: not valid Python ({e})"
        return
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            for match in LOCAL_PATH.finditer(node.value):
                yield f"{name}:{node.lineno}: {match[0]} exists on your computer only"


def check_text(name: str, text: str) -> Iterator[str]:
    """Warnings for local paths in a text file."""
    for number, line in enumerate(text.splitlines(), 1):
        for match in LOCAL_PATH.finditer(line):
            yield f"{name}:{number}: {match[0]} exists on your computer only"


def check(packed: dict[str, Path], excluded: dict[str, str]) -> list[str]:
    """Check the files and return warnings.

    Raises:
        Refused: a required file is missing, or Python code is invalid or contains a local path.
    """
    errors, warnings = check_required(packed, excluded), []
    for name, path in packed.items():
        if path.suffix == ".py":
            errors += check_python(name, path.read_bytes())
        elif path.suffix.lower() in TEXT:
            warnings += check_text(name, path.read_text(encoding="utf-8", errors="replace"))
    if errors:
        raise Refused(*errors)
    if not any(n.startswith("writeup/") and n.lower().endswith((".pdf", ".md")) for n in packed):
        warnings.append("writeup/ holds neither a PDF nor a Markdown file")
    return warnings + check_writeup(packed)


def check_writeup(packed: dict[str, Path]) -> list[str]:
    """Warnings for the parts that a write-up of `report.py --writeup` still lacks."""
    writeup, module = packed.get("writeup/writeup.md"), packed.get(STUDENT_TEXT)
    if writeup is None or module is None:
        return []
    try:
        parts = runpy.run_path(str(module))["missing_parts"](writeup.read_text(encoding="utf-8"))
    except ValueError as e:
        return [f"writeup/writeup.md: {e}"]
    return [f"writeup/writeup.md lacks {part}" for part in parts]


def write_zip(packed: dict[str, Path], target: Path) -> None:
    """Write a temporary file, then rename it: an old zip stays until the new one is complete."""
    temporary = target.with_name(target.name + ".part")
    try:
        with open(temporary, "wb") as file:
            write_archive(packed, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_archive(packed: dict[str, Path], file: BinaryIO) -> None:
    """Write the zip; dates and permissions do not depend on the computer."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in packed.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # Unix, rw-r--r--
            archive.writestr(entry, path.read_bytes())


def main(root: Path) -> None:
    """Pack the project at `root`; print every file, every omission and every warning.

    Raises:
        Refused: the submission is not valid.
        OSError, UnicodeError: a file cannot be read or written.
    """
    packed, excluded = collect(root)
    warnings = check(packed, excluded)
    write_zip(packed, root / "submission.zip")
    for name, path in packed.items():
        print(f"{path.stat().st_size:>12,}  {name}")
    for name, reason in sorted(excluded.items()):
        print(f"    left out  {name} ({reason})")
    for warning in warnings:
        print(f"     warning  {warning}")
    total = sum(path.stat().st_size for path in packed.values())
    size = (root / "submission.zip").stat().st_size
    print(f"submission.zip: {len(packed)} files, {total:,} bytes, {size:,} packed")


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    signal.signal(signal.SIGINT, INTERRUPT)
    try:
        main(Path(__file__).resolve().parent)
    except Refused as e:
        sys.exit("\n".join(f"zip_submission.py: {line}" for line in e.args))
    except (OSError, UnicodeError) as e:
        sys.exit(f"zip_submission.py: cannot pack: {e}")
    except KeyboardInterrupt:
        print("zip_submission.py: stopped; run it again", file=sys.stderr)
        sys.exit(130)
