"""Pack code/, writeup/ and results/ into submission.zip, ready to hand in.

    python zip_submission.py

Data, logs, models, caches, hidden files and links out of the project stay out, each with a line
saying so. Nothing is written when a required file is missing, or when Python code names a path
that exists on one computer only. The same files always give the same bytes.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("code", "writeup", "results")
REQUIRED = (
    "code/student_code.py",
    "code/main.py",
    "code/custom_blocks.py",
    "code/custom_dataloader.py",
    "code/custom_transforms.py",
    "code/utils.py",
)
UNWANTED_FOLDERS = {"data": "data", "logs": "logs", "__pycache__": "cache"}
UNWANTED_FILES = {
    "model": (".pth", ".pt", ".pth.tar", ".ckpt", ".safetensors", ".onnx", ".pkl", ".h5"),
    "data": (".tar", ".npy", ".npz", ".gz", ".tgz", ".zip"),
    "log": (".log",),
    "cache": (".pyc", ".pyo"),
}
TEXT = {".cfg", ".ini", ".ipynb", ".json", ".md", ".sh", ".tex", ".toml", ".txt", ".yaml", ".yml"}

# a home directory, a mounted disk or a Windows drive; not the tail of an address or longer path
OWN_PATH = re.compile(
    r"(?<![\w.:/-])/(?:home|Users|root|mnt|media|scratch|Volumes|kaggle|content/drive)/\w[^\s'\"]*"
    r"|(?<![\w\\])[A-Za-z]:[\\/]+\w[\w .-]*[\\/][^\s'\"]*"
)


class Refused(Exception):
    """Why nothing was packed; each argument is one line."""


def collect(root: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The files to pack, and what is left out with its reason, both by name inside the zip."""
    packed, left_out = {}, {}
    for top in FOLDERS:
        if (root / top).is_symlink():
            left_out[top] = "link"
        elif (root / top).is_dir():
            collect_folder(root, root / top, packed, left_out)
    return dict(sorted(packed.items())), left_out


def collect_folder(
    root: Path, folder: Path, packed: dict[str, Path], left_out: dict[str, str]
) -> None:
    for path in folder.iterdir():
        name = path.relative_to(root).as_posix()
        if reason := unwanted(path, root):
            left_out[name] = reason
        elif path.is_dir():
            collect_folder(root, path, packed, left_out)
        else:
            packed[name] = path


def unwanted(path: Path, root: Path) -> str | None:
    """Why a file or folder stays out of the zip; None if it belongs in it."""
    if not path.is_symlink():
        return unwanted_kind(path)
    target = path.resolve()
    if not target.is_file() or not any(target.is_relative_to(root / top) for top in FOLDERS):
        return "link to a folder, to nothing or out of the project"
    # a link is packed as the file it leads to, if that one would be
    steps = [target, *target.parents][: len(target.relative_to(root).parts) - 1]
    return next((kind for step in [path, *steps] if (kind := unwanted_kind(step))), None)


def unwanted_kind(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "cache" if (path / "pyvenv.cfg").exists() else UNWANTED_FOLDERS.get(path.name)
    if not path.is_file():
        return "not a file"
    if path.name.startswith("events.out.tfevents"):
        return "log"
    kinds = (k for k, suffixes in UNWANTED_FILES.items() if path.name.lower().endswith(suffixes))
    return next(kinds, None)


def check_required(packed: dict[str, Path], left_out: dict[str, str]) -> list[str]:
    missing = [name for name in REQUIRED if name not in packed]
    return [f"{n} is missing" + (f" ({left_out[n]})" if n in left_out else "") for n in missing]


def check_python(name: str, source: bytes) -> Iterator[str]:
    """Complain of strings that hold a path of one's own computer; comments and docs may."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as e:
        yield f"{name}:{getattr(e, 'lineno', None) or 1}: not valid Python ({e})"
        return
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            for match in OWN_PATH.finditer(node.value):
                yield f"{name}:{node.lineno}: {match[0]} exists on your computer only"


def check_text(name: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        for match in OWN_PATH.finditer(line):
            yield f"{name}:{number}: {match[0]} exists on your computer only"


def check(packed: dict[str, Path], left_out: dict[str, str]) -> list[str]:
    """Raise Refused if this should not be handed in; return warnings otherwise."""
    errors, warnings = check_required(packed, left_out), []
    for name, path in packed.items():
        if path.suffix == ".py":
            errors += check_python(name, path.read_bytes())
        elif path.suffix.lower() in TEXT:
            warnings += check_text(name, path.read_text(encoding="utf-8", errors="replace"))
    if errors:
        raise Refused(*errors)
    if not any(n.startswith("writeup/") and n.lower().endswith((".pdf", ".md")) for n in packed):
        warnings.append("writeup/ holds neither a PDF nor a Markdown file")
    return warnings


def write_zip(packed: dict[str, Path], target: Path) -> None:
    """Write beside the target, then rename: an old zip stays until the new one is whole."""
    temporary = target.with_name(target.name + ".part")
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, path in packed.items():
                    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    entry.create_system, entry.external_attr = 3, 0o644 << 16  # as on Unix
                    archive.writestr(entry, path.read_bytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def main(root: Path) -> None:
    packed, left_out = collect(root)
    warnings = check(packed, left_out)
    write_zip(packed, root / "submission.zip")
    for name, path in packed.items():
        print(f"{path.stat().st_size:>12,}  {name}")
    for name, reason in sorted(left_out.items()):
        print(f"    left out  {name} ({reason})")
    for warning in warnings:
        print(f"     warning  {warning}")
    total = sum(path.stat().st_size for path in packed.values())
    size = (root / "submission.zip").stat().st_size
    print(f"submission.zip: {len(packed)} files, {total:,} bytes, {size:,} packed")


if __name__ == "__main__":
    try:
        main(Path(__file__).resolve().parent)
    except Refused as e:
        sys.exit("\n".join(f"zip_submission.py: {line}" for line in e.args))
    except (OSError, UnicodeError) as e:
        sys.exit(f"zip_submission.py: cannot pack: {e}")
