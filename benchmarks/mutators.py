"""Seeded ways to spoil files: bytes, label files, images, checkpoints.

Every function takes a `random.Random`, so that a case is found again by its number.
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
    return data[: rng.randrange(len(data) + 1)]


def flip(rng: random.Random, data: bytes) -> bytes:
    spoilt = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64]) if spoilt else 0):
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """A stretch of zeros, of 0xFF, or of noise."""
    start, length = rng.randrange(len(data) + 1), rng.randrange(1, 200)
    filling = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
    return data[:start] + filling + data[start + length :]


def insert(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.randrange(1, 50)) + data[start:]


def repeat(rng: random.Random, data: bytes) -> bytes:
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:]


def spoil_header(rng: random.Random, data: bytes) -> bytes:
    """Where formats keep sizes and kinds."""
    at = rng.randrange(min(len(data), 64) + 1)
    size = rng.choice([b"\0", b"\xff", b"\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"])
    return data[:at] + size + data[at + len(size) :]


BYTES = [cut, flip, overwrite, insert, repeat, spoil_header]


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
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


def spoil_labels(rng: random.Random, text: str) -> bytes:
    """Lines that are dropped, doubled, swapped, or have words and letters spoilt in them."""
    lines = text.split("\n")
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(lines))
        line, spot = lines[at], rng.randrange(len(lines[at]) + 1)
        word = rng.choice(WORDS)
        lines[at] = rng.choice(
            [
                line[:spot] + word + line[spot:],
                line[:spot] + word + line[spot + len(word) :],
                line[:spot],
                word,
                f"{word} {line.split(' ')[-1]}",
                f"{line.split(' ')[0]} {word}",
                rng.choice(lines),
                line.replace("/", word or "/"),
            ]
        )
    data = rng.choice(["\n", "\n", "\r\n", "\r"]).join(lines).encode("utf-8", "surrogatepass")
    data = rng.choice([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]) + data
    return spoil_bytes(rng, data) if rng.random() < 0.3 else data


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def images() -> list[bytes]:
    """Whole images of many formats."""
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
    """Runs `function(*arguments)` in whoever unpickles it."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def odd_values(rng: random.Random) -> list:
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


def spoil_content(rng: random.Random, content: dict) -> dict:
    """A copy with one entry, at any depth, dropped, renamed or replaced by something odd."""
    spoilt = dict(content)
    key = rng.choice(list(spoilt))
    inner = spoilt[key]
    if isinstance(inner, dict) and inner and rng.random() < 0.8:
        spoilt[key] = spoil_content(rng, inner)
        return spoilt
    way = rng.randrange(4)
    if way == 0:
        del spoilt[key]
    elif way == 1:
        spoilt[rng.choice([f"module.{key}", f"{key}x", 5, None, ""])] = spoilt.pop(key)
    elif way == 2 and isinstance(inner, torch.Tensor) and inner.is_floating_point():
        spoilt[key] = inner * rng.choice([float("nan"), float("inf"), 1e30])
    else:
        spoilt[key] = rng.choice(odd_values(rng))
    return spoilt


def spoil_checkpoint(rng: random.Random, content: dict, canary: str) -> bytes:
    """Spoilt content, spoilt bytes, or a pickle that would create the folder `canary`."""
    way = rng.random()
    if way < 0.6:
        for _ in range(rng.choice([1, 1, 2, 3])):
            content = spoil_content(rng, content) or content
    elif way < 0.7:
        content = {**content, rng.choice(list(content)): Trap(*trap(rng, canary))}
    buffer = io.BytesIO()
    if rng.random() < 0.05:
        pickle.dump(content, buffer)
    else:
        torch.save(content, buffer, _use_new_zipfile_serialization=rng.random() < 0.8)
    data = buffer.getvalue()
    return spoil_bytes(rng, data) if way >= 0.7 else data


def trap(rng: random.Random, canary: str) -> tuple:
    return rng.choice(
        [
            (os.mkdir, canary),
            (os.system, f"mkdir {canary}"),
            (eval, f"__import__('os').mkdir({canary!r})"),
            (exec, f"import os; os.mkdir({canary!r})"),
            (subprocess.call, ["mkdir", canary]),
        ]
    )
