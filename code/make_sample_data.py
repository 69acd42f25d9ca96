"""Draw a small data set in the MiniPlaces layout: ten kinds of scenes, no download.

    python make_sample_data.py                       # ../data/sample, 60 + 20 images per category
    python make_sample_data.py ../data/scenes --train 200 --val 50 --seed 1

A category is a layout, not a color: every image has a random palette and is then shifted to a
random mean color, so that a network has to look at shapes. The images follow from the seed.
The folder appears when it is complete; an existing one is not touched.
"""

from __future__ import annotations

import signal

INTERRUPT = signal.getsignal(signal.SIGINT)
if __name__ == "__main__":  # Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path

import cv2
import numpy as np

from utils import UserError, save_image

DEFAULT_ROOT = Path(__file__).resolve().parent.parent / "data" / "sample"
SIZE = 128
CANVAS = 256  # scenes are drawn twice as large, then reduced: smooth edges

Rng = np.random.Generator
Colors = list[tuple[int, int, int]]


# ---------------------------------------------------------------------------------------------
# Scenes: each draws on a (CANVAS, CANVAS, 3) image in the colours of one palette.
# Positions are fractions of the canvas, (0, 0) at the top left.
# ---------------------------------------------------------------------------------------------


def beach(img: np.ndarray, rng: Rng, colors: Colors) -> None:
    """Sea with waves, a tilted shore, sometimes a sun."""
    horizon, shore = rng.uniform(0.25, 0.45), rng.uniform(0.55, 0.7)
    polygon(img, [(0, horizon), (1, horizon), (1, 1), (0, 1)], colors[2])
    for y in np.linspace(horizon + 0.04, shore, 7):
        wave = curve(rng, y, 0.008, 3)
        lines(img, wave, colors[3], rng.integers(2, 5))
    tilt = rng.uniform(0.08, 0.25)
    sand = [(x, y + tilt * x) for x, y in curve(rng, shore, 0.03, 2)]
    polygon(img, [*sand, (1, 1), (0, 1)], colors[4])
    lines(img, sand, colors[3], 5)
    if rng.random() < 0.6:
        disc(img, (rng.uniform(0.1, 0.9), horizon * rng.uniform(0.2, 0.6)), 0.06, colors[5])


def bridge(img: np.ndarray, rng: Rng, colors: Colors) -> None:
    """Arches over water, a deck above."""
    deck, water = rng.uniform(0.35, 0.5), rng.uniform(0.75, 0.85)
    polygon(img, [(0, deck), (1, deck), (1, water), (0, water)], colors[2])
    arches = rng.integers(2, 5)
    start = rng.uniform(-0.3, 0.0)
    for x in start + np.arange(arches + 2) / arches:
        half = rng.uniform(0.36, 0.42) / arches
        height = water - deck - 0.08
        ellipse(img, (x, water), (half, height), colors[0])
    polygon(img, [(0, water), (1, water), (1, 1), (0, 1)], colors[3])
    for _ in range(12):
        x, y, length = rng.uniform(0, 1), rng.uniform(water + 0.02, 1), rng.uniform(0.05, 0.2)
        lines(img, [(x, y), (x + length, y)], colors[4], 2)
    lines(img, [(0, deck), (1, deck)], colors[5], rng.integers(6, 14))


def city(img: np.ndarray, rng: Rng, colors: Colors) -> None:
    """Houses with lit windows."""
    x = rng.uniform(-0.1, 0)
    while x < 1:
        width, top = rng.uniform(0.1, 0.22), rng.uniform(0.15, 0.6)
        box(img, x, top, width, 1 - top, colors[rng.integers(2, 5)])
        step = rng.uniform(0.035, 0.05)
        columns = np.arange(x + step / 2, x + width - step / 2, step)
        for wx, wy in product(columns, np.arange(top + step / 2, 1, step * 1.4)):
            if rng.random() < 0.7:
                box(img, wx, wy, step * 0.5, step * 0.7, colors[5])
        x += width + rng.uniform(0, 0.03)


def corridor(img: np.ndarray, rng: Rng, colors: Colors) -> None:
    """Four walls that converge on a far door."""
    cx, cy, half = rng.uniform(0.35, 0.65), rng.uniform(0.4, 0.6), rng.uniform(0.08, 0.14)
    far = [(cx - half, cy - half), (cx + half, cy - half), (cx + half, cy + half)]
    far.append((cx - half, cy + half))
    near = [(0, 0), (1, 0), (1, 1), (0, 1)]
    for side in range(4):
        nxt = (side + 1) % 4
        polygon(img, [near[side], near[nxt], far[nxt], far[side]], colors[1 + side % 3])
    polygon(img, far, colors[4])
    for share in 1 - rng.uniform(0.55, 0.7) ** np.arange(1, 6):
        ring = [lerp(n, f, share) for n, f in zip(near, far, strict=True)]
        lines(img, [*ring, ring[0]], colors[5], max(1, round(6 * (1 - share))))


def desert(img: np.ndarray, rng: Rng, colors: Colors) -> None:
    """Layers of dunes."""
    layers = rng.integers(3, 6)
    for layer, y in enumerate(np.linspace(rng.uniform(0.3, 0.45), 0.85, layers)):
        dune = curve(rng, y, rng.uniform(0.06, 0.12), 1.5)
        polygon(img, [*dune, (1, 1), (0, 1)], colors[2 + layer % 3])
        lines(img, dune, colors[5], 2)


def field(img: np.ndarray, rng: Rng, colors: Colors) -> None:
    """Furrows that converge on the horizon."""
    horizon, vanishing = rng.uniform(0.2, 0.45), rng.uniform(0.2, 0.8)
    polygon(img, [(0, horizon), (1, horizon), (1, 1), (0, 1)], colors[2])
    feet = np.arange(-2.5, 3.5, rng.uniform(0.22, 0.35)) + rng.uniform(0, 0.2)
    for foot in feet:
        width = rng.uniform(0.08, 0.14)
        polygon(img, [(vanishing, horizon), (foot, 1), (foot + width, 1)], colors[3])
    lines(img, curve(rng, horizon, 0.015, 4), colors[4], 6)


def forest(img: np.ndarray, rng: Rng, colors: Colors) -> None:
    """Trunks of several depths, leaves above."""
    ground = rng.uniform(0.7, 0.85)
    polygon(img, [*curve(rng, ground, 0.02, 3), (1, 1), (0, 1)], colors[2])
    for depth in np.sort(rng.uniform(0, 1, rng.integers(9, 16))):
        x, width = rng.uniform(0, 1), 0.012 + 0.035 * depth
        lean, foot = rng.normal(0, 0.02), ground + 0.15 * depth
        trunk = [(x - width + lean, 0), (x + width + lean, 0), (x + width, foot), (x - width, foot)]
        polygon(img, trunk, colors[rng.integers(3, 5)])
    for _ in range(rng.integers(8, 20)):
        disc(img, (rng.uniform(0, 1), rng.uniform(0, 0.25)), rng.uniform(0.03, 0.08), colors[5])


def mountain(img: np.ndarray, rng: Rng, colors: Colors) -> None:
    """Two ranges with snow on the peaks."""
    for layer in range(2):
        base = 0.45 + 0.25 * layer
        xs = np.linspace(-0.1, 1.1, rng.integers(6, 9))
        ys = [base + rng.uniform(-0.32, -0.15) * (i % 2) for i in range(len(xs))]
        ys = [y + rng.uniform(-0.04, 0.04) for y in ys]
        polygon(img, [*zip(xs, ys, strict=True), (1.1, 1), (-0.1, 1)], colors[2 + layer])
        for i in range(1, len(xs) - 1, 2):
            peak = xs[i], ys[i]
            left, right = (lerp(peak, (xs[j], ys[j]), 0.3) for j in (i - 1, i + 1))
            polygon(img, [peak, left, lerp(left, right, 0.5), right], colors[5])
    polygon(img, [*curve(rng, 0.88, 0.02, 2), (1, 1), (0, 1)], colors[4])


def road(img: np.ndarray, rng: Rng, colors: Colors) -> None:
    """A road with a center line, posts at its edges."""
    horizon, vanishing = rng.uniform(0.3, 0.5), rng.uniform(0.3, 0.7)
    polygon(img, [(0, horizon), (1, horizon), (1, 1), (0, 1)], colors[2])
    left, right = rng.uniform(-0.1, 0.2), rng.uniform(0.8, 1.1)
    polygon(img, [(vanishing, horizon), (left, 1), (right, 1)], colors[3])
    middle = (left + right) / 2
    for share in 0.68 ** np.arange(0, 6):
        dash = [(share, 0.02), (share * 0.82, 0.02)]
        corners = [(s, side) for s, w in dash for side in (-w, w)]
        points = [
            (vanishing + (middle + side - vanishing) * s, horizon + (1 - horizon) * s)
            for s, side in (corners[0], corners[1], corners[3], corners[2])
        ]
        polygon(img, points, colors[5])
    for share in 0.6 ** np.arange(0, 5):
        for edge in (left - 0.25, right + 0.25):
            x, y = lerp((vanishing, horizon), (edge, 1), share)
            lines(img, [(x, y), (x, y - 0.5 * share)], colors[4], max(1, round(10 * share)))


def village(img: np.ndarray, rng: Rng, colors: Colors) -> None:
    """Houses with roofs, windows and doors."""
    ground = rng.uniform(0.6, 0.75)
    polygon(img, [*curve(rng, ground, 0.03, 2), (1, 1), (0, 1)], colors[2])
    for x in np.arange(rng.uniform(-0.1, 0.1), 0.95, rng.uniform(0.28, 0.4)):
        w, h = rng.uniform(0.2, 0.28), rng.uniform(0.16, 0.26)
        top = ground + rng.uniform(0.0, 0.12) - h
        box(img, x, top, w, h, colors[3])
        ridge = x + w * rng.uniform(0.4, 0.6), top - rng.uniform(0.1, 0.18)
        polygon(img, [(x - 0.03, top), ridge, (x + w + 0.03, top)], colors[4])
        for share in (0.15, 0.65):
            box(img, x + w * share, top + h * 0.2, w * 0.2, h * 0.25, colors[5])
        box(img, x + w * 0.42, top + h * 0.55, w * 0.16, h * 0.45, colors[1])


SCENES = (beach, bridge, city, corridor, desert, field, forest, mountain, road, village)


# ---------------------------------------------------------------------------------------------
# Strokes
# ---------------------------------------------------------------------------------------------


def pixels(points) -> np.ndarray:
    """Points as OpenCV's fixed-point pixels, 4 fractional bits."""
    return np.round(np.array(points) * CANVAS * 16).astype(np.int32)


def polygon(img: np.ndarray, points, color) -> None:
    """Fill a polygon."""
    cv2.fillPoly(img, [pixels(points)], color, cv2.LINE_AA, shift=4)


def lines(img: np.ndarray, points, color, width: int) -> None:
    """Draw a polyline of `width` pixels."""
    cv2.polylines(img, [pixels(points)], False, color, int(width), cv2.LINE_AA, shift=4)


def box(img: np.ndarray, x: float, y: float, w: float, h: float, color) -> None:
    """Fill the rectangle with its top left corner at (x, y)."""
    polygon(img, [(x, y), (x + w, y), (x + w, y + h), (x, y + h)], color)


def ellipse(img: np.ndarray, center, axes, color) -> None:
    """Fill an ellipse with the semi-axes `axes`."""
    turn = np.linspace(0, 2 * np.pi, 40)
    polygon(img, np.array(center) + np.stack([np.cos(turn), np.sin(turn)], 1) * axes, color)


def disc(img: np.ndarray, center, radius: float, color) -> None:
    """Fill a circle."""
    ellipse(img, center, (radius, radius), color)


def curve(rng: Rng, y: float, height: float, waves: float) -> list[tuple[float, float]]:
    """A wavy line across the canvas at height y: three sines of random phase."""
    x = np.linspace(0, 1, 60)
    phases = rng.uniform(0, 2 * np.pi, 3)
    wave = sum(np.sin(2 * np.pi * waves * k * x + p) / k for k, p in enumerate(phases, 1))
    return list(zip(x, y + height * wave / 1.5, strict=True))


def lerp(a, b, share: float) -> tuple[float, float]:
    """The point that divides the line from a to b at the fraction `share`."""
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def draw_scene(scene, rng: Rng) -> np.ndarray:
    """One image (SIZE, SIZE, 3), RGB uint8."""
    colors = palette(rng)
    sky = np.linspace(colors[0], colors[1], CANVAS).astype(np.uint8)
    img = np.repeat(sky[:, None], CANVAS, axis=1)
    scene(img, rng, colors)
    img = cv2.resize(img, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        img = cv2.flip(img, 1)
    img = img + texture(rng)
    # the mean must not predict the scene: draw it at random
    img += np.float32(rng.uniform(95, 160, 3) - cv2.mean(img)[:3])
    return np.clip(np.round(img), 0, 255).astype(np.uint8)


def palette(rng: Rng) -> Colors:
    """Six colors of random hue and saturation; their evenly spaced brightnesses are shuffled."""
    hsv = np.stack(
        [rng.uniform(0, 180, 6), rng.uniform(30, 170, 6), rng.permutation(np.linspace(50, 235, 6))]
    )
    rgb = cv2.cvtColor(hsv.T[None].astype(np.uint8), cv2.COLOR_HSV2RGB)[0]
    return [tuple(map(int, color)) for color in rgb]


def texture(rng: Rng) -> np.ndarray:
    """Additive noise at three scales, (SIZE, SIZE, 3): clouds, patches, grain."""
    total = np.zeros((SIZE, SIZE, 3), np.float32)
    for cells, strength in ((4, 14), (24, 8), (SIZE, 5)):
        noise = rng.standard_normal((cells, cells, 3), np.float32)
        noise *= np.float32(strength * rng.uniform(0.5, 1.5))
        total += cv2.resize(noise, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    return total


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def make_sample_data(root: Path, train: int, val: int, seed: int) -> bool:
    """Write the data set, `train` and `val` images per category; return False if it exists.

    Raises:
        UserError: `root` is in use for something else, or cannot be written.
    """
    if (root / "train.txt").is_file():
        return False
    if root.exists():
        raise UserError(f"{root} exists and is no data set; choose another folder, or remove it")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".scenes-", dir=root.parent) as scratch:
            folder = Path(scratch) / root.name
            write_split(folder, "train", train, seed)
            write_split(folder, "val", val, seed)
            names = [f"{scene.__name__} {label}" for label, scene in enumerate(SCENES)]
            write_lines(folder / "categories.txt", names)
            folder.rename(root)
    except OSError as e:
        raise UserError(f"cannot write {root}: {e.strerror or e}") from None
    return True


def write_split(folder: Path, split: str, count: int, seed: int) -> None:
    """images/train/<letter>/<category>/NNNNNNNN.jpg, or images/val/NNNNNNNN.jpg, and their list."""
    labels = np.repeat(np.arange(len(SCENES)), count)
    if split == "val":
        labels = np.random.default_rng(seed).permutation(labels)
    numbers = np.zeros(len(SCENES), int)
    rows = []
    for position, label in enumerate(labels, 1):
        scene, name = SCENES[label], SCENES[label].__name__
        numbers[label] += 1
        path = f"train/{name[0]}/{name}/{numbers[label]:08d}.jpg"
        if split == "val":
            path = f"val/{position:08d}.jpg"
        rng = np.random.default_rng((seed, split == "val", label, numbers[label]))
        target = folder / "images" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        save_image(target, draw_scene(scene, rng))
        rows.append(f"{path} {label}")
    write_lines(folder / f"{split}.txt", rows)


def write_lines(path: Path, rows: list[str]) -> None:
    """Write a text file with \\n at every line's end."""
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8", newline="\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [FOLDER] [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "root", nargs="?", type=Path, default=DEFAULT_ROOT, metavar="FOLDER", help="folder to make"
    )
    parser.add_argument(
        "--train", type=positive, default=60, help="training images per category; default 60"
    )
    parser.add_argument(
        "--val", type=positive, default=20, help="validation images per category; default 20"
    )
    parser.add_argument("--seed", type=natural, default=2024, help="of the drawings; default 2024")
    args = parser.parse_args()
    try:
        new = make_sample_data(args.root, args.train, args.val, args.seed)
    except UserError as e:
        sys.exit(f"error: {e}")
    if new:
        print(f"{args.root}: {len(SCENES)} categories of {args.train} + {args.val} images")
    else:
        print(f"{args.root} exists already; remove it to draw it again")


def natural(text: str) -> int:
    """An argparse type: a whole number of at most 8 digits."""
    if not (text.isascii() and text.isdigit() and len(text) < 9):
        raise argparse.ArgumentTypeError(f"expected a whole number of at most 8 digits, got {text}")
    return int(text)


def positive(text: str) -> int:
    """An argparse type: a `natural` of at least 1."""
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("expected at least 1")
    return natural(text)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # an encoding may lack characters of the output
        stream.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, INTERRUPT)
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; run it again", file=sys.stderr)
        sys.exit(130)
