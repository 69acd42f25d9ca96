"""Seeded corruption of files: bytes, label files, images, checkpoints.

Every function takes a `random.Random`, so that each case can be repeated from its seed.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
from collections.abc import Callable

import cv2
import numpy as np
import torch

# ---------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------


def cut(rng: random.Random, data: bytes) -> bytes:
    """Truncate at a random position."""
    return data[: rng.randrange(len(data) + 1)]


def flip(rng: random.Random, data: bytes) -> bytes:
    """Flip 1 to 64 random bits."""
    corrupted = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64]) if corrupted else 0):
        corrupted[rng.randrange(len(corrupted))] ^= 1 << rng.randrange(8)
    return bytes(corrupted)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """Overwrite up to 199 bytes by zeros, 0xFF or noise."""
    start, length = rng.randrange(len(data) + 1), rng.randrange(1, 200)
    filling = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
    return data[:start] + filling + data[start + length :]


def insert(rng: random.Random, data: bytes) -> bytes:
    """Insert up to 49 random bytes."""
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.randrange(1, 50)) + data[start:]


def repeat(rng: random.Random, data: bytes) -> bytes:
    """Repeat a random range."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:]


def corrupt_header(rng: random.Random, data: bytes) -> bytes:
    """Overwrite within the first 64 bytes, where formats store sizes and types."""
    start = rng.randrange(min(len(data), 64) + 1)
    size = rng.choice([b"\0", b"\xff", b"\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"])
    return data[:start] + size + data[start + len(size) :]


BYTES = [cut, flip, overwrite, insert, repeat, corrupt_header]


def corrupt_bytes(rng: random.Random, data: bytes) -> bytes:
    """Apply one to four random corruptions."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data = rng.choice(BYTES)(rng, data)
    return data


# ---------------------------------------------------------------------------------------------
# Label files
# ---------------------------------------------------------------------------------------------

WORDS = [
    *("", " ", "\t", "\0", "\r", "\r\n", "\n\n", "\ufeff", "\u2028", "\x85", "\x0c", "\x1b[2J"),
    *("0", "-1", "9", "10", "1e3", "+1", "1_0", "٣", "³", "0x1", "999999999999999999999", "nan"),
    *("..", "../", "/", "//", "./", "~", "C:", "\\", "..\\", "%2e%2e/", "a b", "𝟙", "é", "\ud800"),
]


def corrupt_labels(rng: random.Random, text: str) -> bytes:
    """Replace, duplicate or truncate lines, or insert odd words into them; sometimes bytes too."""
    lines = text.split("\n")
    for _ in range(rng.choice([1, 1, 2, 5])):
        number = rng.randrange(len(lines))
        line, start = lines[number], rng.randrange(len(lines[number]) + 1)
        word = rng.choice(WORDS)
        lines[number] = rng.choice(
            [
                line[:start] + word + line[start:],
                line[:start] + word + line[start + len(word) :],
                line[:start],
                word,
                f"{word} {line.split(' ')[-1]}",
                f"{line.split(' ')[0]} {word}",
                rng.choice(lines),
                line.replace("/", word or "/"),
            ]
        )
    data = rng.choice(["\n", "\n", "\r\n", "\r"]).join(lines).encode("utf-8", "surrogatepass")
    data = rng.choice([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]) + data
    return corrupt_bytes(rng, data) if rng.random() < 0.3 else data


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def images() -> list[bytes]:
    """Intact images in many formats."""
    color = cv2.GaussianBlur(
        np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8), (5, 5), 0
    )
    alpha = np.dstack([color, color[..., 0]])
    return [
        cv2.imencode(suffix, image, options)[1].tobytes()
        for suffix, image, options in [
            (".jpg", color, []),
            (".jpg", color[..., 0], []),
            (".jpg", color, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
            (".jpg", color, [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]),
            (".png", color, []),
            (".png", alpha, []),
            (".png", color.astype(np.uint16) * 257, []),
            (".png", color[..., 0], []),
            (".bmp", color, []),
            (".webp", color, []),
            (".tiff", color, []),
            (".ppm", color, []),
        ]
    ]


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


class Trap:
    """An object that runs `function(*arguments)` when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        """The call that pickle stores."""
        return self.call


def odd_values(rng: random.Random) -> list:
    """Values that do not belong in a checkpoint."""
    return [
        *(None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "text", b"x", [], {}),
        *([1, [2]], {"a": 1}, {1: {}}, (1, 2), {1, 2}),
        *(torch.zeros(0), torch.zeros(3), torch.tensor(float("nan")), torch.zeros(2, 3).half()),
        *(
            torch.zeros(3, dtype=torch.int64),
            torch.eye(3).to_sparse(),
            torch.zeros(2, dtype=torch.cfloat),
        ),
        rng.randrange(10**6),
    ]


def corrupt_entry(rng: random.Random, ckpt: dict) -> dict:
    """A copy with one entry, at any depth, dropped, renamed or replaced by an odd value."""
    corrupted = dict(ckpt)
    key = rng.choice(list(corrupted))
    value = corrupted[key]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        corrupted[key] = corrupt_entry(rng, value)
        return corrupted
    kind = rng.randrange(4)
    if kind == 0:
        del corrupted[key]
    elif kind == 1:
        corrupted[rng.choice([f"module.{key}", f"{key}x", 5, None, ""])] = corrupted.pop(key)
    elif kind == 2 and isinstance(value, torch.Tensor) and value.is_floating_point():
        corrupted[key] = value * rng.choice([float("nan"), float("inf"), 1e30])
    else:
        corrupted[key] = rng.choice(odd_values(rng))
    return corrupted


def corrupt_checkpoint(rng: random.Random, ckpt: dict, canary: str) -> bytes:
    """Corrupted entries, corrupted bytes, or a pickle that would create the folder `canary`."""
    kind = rng.random()
    if kind < 0.6:
        for _ in range(rng.choice([1, 1, 2, 3])):
            ckpt = corrupt_entry(rng, ckpt) or ckpt
    elif kind < 0.7:
        ckpt = {**ckpt, rng.choice(list(ckpt)): Trap(*trap(rng, canary))}
    buffer = io.BytesIO()
    if rng.random() < 0.05:
        pickle.dump(ckpt, buffer)
    else:
        torch.save(ckpt, buffer, _use_new_zipfile_serialization=rng.random() < 0.8)
    data = buffer.getvalue()
    return corrupt_bytes(rng, data) if kind >= 0.7 else data


def trap(rng: random.Random, canary: str) -> tuple:
    """A call that creates the folder `canary`: (function, *arguments)."""
    return rng.choice(
        [
            (os.mkdir, canary),
            (os.system, f"mkdir {canary}"),
            (eval, f"__import__('os').mkdir({canary!r})"),
            (exec, f"import os; os.mkdir({canary!r})"),
            (subprocess.call, ["mkdir", canary]),
        ]
    )
