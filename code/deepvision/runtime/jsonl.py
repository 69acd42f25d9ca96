"""Read JSON and JSON-lines files; a damaged file raises UserError."""

from __future__ import annotations

import json
from pathlib import Path

from utils import UserError


def read_json(path: Path) -> dict:
    """The object in a file; {} where there is no file.

    Raises:
        UserError: the file cannot be read, or holds no object.
    """
    text = _read_text(path)
    return _parse(path, text) if text else {}


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file with one per line; [] where there is no file.

    Raises:
        UserError: the file cannot be read, or a line holds no object.
    """
    return [_parse(path, line) for line in _read_text(path).splitlines()]


def read_metrics(path: Path) -> list[dict]:
    """The rows of metrics.jsonl: an epoch, and numbers or null.

    Raises:
        UserError: the file cannot be read, or a line is no such row.
    """
    rows = read_jsonl(path)
    for row in rows:
        values = [row.get("epoch"), *(v for v in row.values() if v is not None)]
        if not all(isinstance(value, (int, float)) for value in values):
            raise UserError(f"{path} is damaged: {str(row)[:60]!r} is no row of it")
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from None


def _parse(path: Path, text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise UserError(f"{path} is damaged: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: expected an object, got {text[:40]!r}")
    return value
