"""What the runs of benchmarks/scene_net.py are worth: tables and a figure with 95 % intervals.

All runs of a data set are judged on the same images, and runs of one seed see the same batches, so
that differences are taken image by image and seed by seed. The variance of a mean over S seeds and
n images is that between seeds / S, and that between images / n. The former is pooled over all
networks, as each has few seeds, and counts twice for a difference; with so few, Student's t is
far wider than the normal distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from results_file import ROOT, provenance, write_section

HALF = "SceneNet, half width"
Key = tuple[str, str]  # part, name


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and images in per cent, or points of a difference, and its error."""

    hits: np.ndarray  # (S, n), or differences of them
    seed_variance: float
    freedom: int  # degrees of it that the variance was estimated with

    @property
    def mean(self) -> float:
        return 100 * self.hits.mean()

    @property
    def margin(self) -> float:
        """Half of the 95 % interval."""
        S, n = self.hits.shape
        images = self.hits.mean(0).var(ddof=1) / n
        return 100 * t_quantile(self.freedom) * (self.seed_variance / S + images) ** 0.5

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.margin:.1f}"

    def signed(self) -> str:
        return f"{self.mean:+.1f} ± {self.margin:.1f}"

    def verdict(self) -> str:
        if abs(self.mean) <= self.margin:
            return "not shown"
        return "helps" if self.mean > 0 else "harms"


def t_quantile(freedom: int) -> float:
    """The quantile of 97.5 % of Student's t (Abramowitz & Stegun, 1964, 26.7.5)."""
    z, v = 1.96, max(freedom, 1)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def pooled(samples: list[np.ndarray]) -> tuple[float, int]:
    """The variance between the seeds of a sample (S, n), over all samples, and its freedom."""
    means = [sample.mean(1) for sample in samples]
    freedom = sum(len(m) - 1 for m in means)
    return sum(((m - m.mean()) ** 2).sum() for m in means) / max(freedom, 1), freedom


class Results:
    """The rows of one data set."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows: dict[Key, dict[int, dict]] = {}
        for row in rows:
            self.rows.setdefault((row["part"], row["name"]), {})[row["seed"]] = row
        self.variance, self.freedom = pooled([self.hits(key, "plain") for key in self.rows])

    def of(self, part: str) -> list[Key]:
        return [key for key in self.rows if key[0] == part]

    def hits(self, key: Key, how: str, seeds: list[int] | None = None) -> np.ndarray:
        """Whether each image was known, by seed: (S, n)."""
        found = [self.rows[key][s] for s in seeds or sorted(self.rows[key])]
        bits = [np.frombuffer(bytes.fromhex(row["hits"][how]), np.uint8) for row in found]
        return np.stack([np.unpackbits(b)[: found[0]["judged"]] for b in bits]).astype(float)

    def accuracy(self, key: Key, how: str = "plain") -> Estimate:
        return Estimate(self.hits(key, how), self.variance, self.freedom)

    def gains(self, reference: Key, others: list[Key]) -> dict[Key, Estimate]:
        """Points by which `reference` is ahead of each of the others."""
        differences = {}
        for key in others:
            seeds = sorted(self.rows[key].keys() & self.rows[reference].keys())
            if seeds:
                differences[key] = self.hits(reference, "plain", seeds) - self.hits(
                    key, "plain", seeds
                )
        return {k: Estimate(d, 2 * self.variance, self.freedom) for k, d in differences.items()}

    def within(self, better: str, worse: str) -> Estimate:
        """Points between two ways of asking the same runs, over all those of SceneNet."""
        keys = [k for k in self.rows if "SceneNet" in k[1] or k[0] == "ablation"]
        d = np.concatenate([self.hits(k, better) - self.hits(k, worse) for k in keys])
        return Estimate(d, *pooled([d]))

    def mean(self, key: Key, column: str) -> float:
        return float(np.mean([row[column] for row in self.rows[key].values()]))


def comparison(results: Results) -> str:
    whole = ("equal epochs", HALF)
    keys = results.of("equal epochs") + results.of("equal time")
    ahead = results.gains(whole, [key for key in keys if key != whole])
    lines = [
        "| network | parameters | epochs | CPU seconds | seeds | top-1 | mirrored | top-5 | "
        "half width is ahead by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key in keys:
        name = f"{key[1]}, in equal time" if key[0] == "equal time" else key[1]
        lines.append(
            f"| {name} | {results.mean(key, 'parameters') / 1e6:.2f} M | "
            f"{results.mean(key, 'epochs'):.0f} | {results.mean(key, 'cpu_seconds'):.0f} | "
            f"{len(results.rows[key])} | {results.accuracy(key)} | "
            f"{results.accuracy(key, 'mirrored')} | {results.mean(key, 'top5'):.1f} | "
            f"{ahead[key].signed() if key in ahead else ''} |"
        )
    return "\n".join(lines)


def worth(results: Results) -> dict[str, Estimate]:
    """What each ingredient adds to SceneNet, mostly of half the width, in points of top-1."""
    whole = ("equal epochs", HALF)
    gains = results.gains(whole, results.of("ablation"))
    found = {key[1]: gain for key, gain in gains.items()}
    found["mean of weights"] = results.within("plain", "last weights")
    found["mirror-averaged evaluation"] = results.within("mirrored", "plain")
    return found


def ablation(results: Results) -> str:
    lines = [
        "| ingredient | runs without it | points of top-1 that it adds | |",
        "|---|---:|---:|---|",
    ]
    for name, gain in worth(results).items():
        lines.append(f"| {name} | {len(gain.hits)} | {gain.signed()} | {gain.verdict()} |")
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Accuracies on the left, what the ingredients add on the right, each with its interval."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    keys = results.of("equal epochs") + results.of("equal time")
    names = [f"{name}{' (equal time)' if part == 'equal time' else ''}" for part, name in keys]
    panels = {
        (left, "top-1, %"): dict(zip(names, map(results.accuracy, keys), strict=True)),
        (right, "points that it adds"): worth(results),
    }
    for (axes, label), found in panels.items():
        for y, estimate in enumerate(found.values()):
            axes.errorbar(estimate.mean, -y, xerr=estimate.margin, fmt="o", color="C0", capsize=3)
        axes.set_yticks([-y for y in range(len(found))], list(found))
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    right.axvline(0, color="grey", linewidth=1)
    figure.savefig(path, dpi=90)


def write_tables(rows: list[dict]) -> None:
    """results/scene_net.md: a section for each training set, with a figure if it has ablations."""
    for data, images in dict.fromkeys((row["data"], row["images"]) for row in rows):
        own = [row for row in rows if (row["data"], row["images"]) == (data, images)]
        results = Results(own)
        commits = ", ".join(sorted({row["commit"] for row in own}))
        dates = sorted(row["date"] for row in own)
        text = (
            f"{provenance()}\n\n{len(own)} runs at commit {commits}, {dates[0]} to {dates[-1]}, "
            f"judged on {own[0]['judged']} images; scene_net.json has the command of each. "
            "Accuracies in per cent with 95 % intervals over seeds and images.\n\n"
            f"{comparison(results)}\n\n"
        )
        if results.of("ablation"):
            picture = f"scene_net_{data}_{images}.png"
            draw(results, ROOT / "results" / picture)
            text += f"{ablation(results)}\n\n![accuracies and ingredients]({picture})\n"
        write_section("scene_net.md", f"{data}, {images} training images of each category", text)
