"""Tables and a figure of the runs of benchmarks/scene_net.py, with 95 % confidence intervals.

All runs of a data set are evaluated on the same images, and runs of one seed see the same batches,
so differences are taken per image and seed. The variance of a mean over S seeds and n images is the
variance between seeds / S plus the variance between images / n. The former is pooled over all
networks, since each has few seeds, and counts twice for a difference. With so few degrees of
freedom, Student's t is far wider than the normal distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from results_file import RESULTS, origin, origin_line, write_section

HALF = "SceneNet, half width"
Key = tuple[str, str]  # part, name


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and images in per cent, or a difference in points, with its interval.

    hits: (S, n), or differences of hits
    freedom: the degrees of freedom of seed_variance
    """

    hits: np.ndarray
    seed_variance: float
    freedom: int

    @property
    def mean(self) -> float:
        """The mean, in per cent."""
        return 100 * self.hits.mean()

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval."""
        S, n = self.hits.shape
        images = self.hits.mean(0).var(ddof=1) / n
        return 100 * t_quantile(self.freedom) * (self.seed_variance / S + images) ** 0.5

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.margin:.1f}"

    def signed(self) -> str:
        """The text with the sign of a difference."""
        return f"{self.mean:+.1f} ± {self.margin:.1f}"

    def effect(self) -> str:
        """What the interval shows of a difference."""
        if abs(self.mean) <= self.margin:
            return "not shown"
        return "helps" if self.mean > 0 else "harms"


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz & Stegun, 1964, 26.7.5)."""
    z, v = 1.96, max(freedom, 1)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def pooled(samples: list[np.ndarray]) -> tuple[float, int]:
    """The variance between seeds, pooled over samples (S, n), and its degrees of freedom."""
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

    def keys_of(self, part: str) -> list[Key]:
        """The keys of one part."""
        return [key for key in self.rows if key[0] == part]

    def hits(self, key: Key, output: str, seeds: list[int] | None = None) -> np.ndarray:
        """1 where an image is classified correctly, else 0, by seed: (S, n).

        output: "plain", "mirrored" or "last weights"
        """
        rows = [self.rows[key][seed] for seed in seeds or sorted(self.rows[key])]
        bits = [np.frombuffer(bytes.fromhex(row["hits"][output]), np.uint8) for row in rows]
        return np.stack([np.unpackbits(b)[: rows[0]["judged"]] for b in bits]).astype(float)

    def accuracy(self, key: Key, output: str = "plain") -> Estimate:
        """Top-1 accuracy."""
        return Estimate(self.hits(key, output), self.variance, self.freedom)

    def gains(self, reference: Key, others: list[Key]) -> dict[Key, Estimate]:
        """The accuracy of `reference` minus that of each of the others, over common seeds."""
        differences = {}
        for key in others:
            seeds = sorted(self.rows[key].keys() & self.rows[reference].keys())
            if seeds:
                ours, theirs = (self.hits(k, "plain", seeds) for k in (reference, key))
                differences[key] = ours - theirs
        return {k: Estimate(d, 2 * self.variance, self.freedom) for k, d in differences.items()}

    def within(self, better: str, worse: str) -> Estimate:
        """The difference between two outputs of the same runs, over all runs of SceneNet."""
        keys = [k for k in self.rows if "SceneNet" in k[1] or k[0] == "ablation"]
        d = np.concatenate([self.hits(k, better) - self.hits(k, worse) for k in keys])
        return Estimate(d, *pooled([d]))

    def mean(self, key: Key, column: str) -> float:
        """The mean of a column over seeds."""
        return float(np.mean([row[column] for row in self.rows[key].values()]))


def comparison(results: Results) -> str:
    """The table of the networks, in Markdown."""
    whole = ("equal epochs", HALF)
    keys = results.keys_of("equal epochs") + results.keys_of("equal time")
    ahead = results.gains(whole, [key for key in keys if key != whole])
    lines = [
        "| network | parameters | epochs | CPU seconds | seeds | top-1 | mirror-averaged | "
        "top-5 | gain of half width |",
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


def ingredient_gains(results: Results) -> dict[str, Estimate]:
    """The gain of each ingredient of SceneNet, mostly at half the width, in points of top-1."""
    gains = results.gains(("equal epochs", HALF), results.keys_of("ablation"))
    by_name = {key[1]: gain for key, gain in gains.items()}
    by_name["EMA of the weights"] = results.within("plain", "last weights")
    by_name["mirror-averaged evaluation"] = results.within("mirrored", "plain")
    return by_name


def ablation(results: Results) -> str:
    """The table of the ingredients, in Markdown."""
    lines = [
        "| ingredient | runs without it | gain in points of top-1 | |",
        "|---|---:|---:|---|",
    ]
    for name, gain in ingredient_gains(results).items():
        lines.append(f"| {name} | {len(gain.hits)} | {gain.signed()} | {gain.effect()} |")
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Accuracies on the left, gains of the ingredients on the right, with their intervals."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    keys = results.keys_of("equal epochs") + results.keys_of("equal time")
    names = [f"{name}{' (equal time)' if part == 'equal time' else ''}" for part, name in keys]
    panels = {
        (left, "top-1, %"): dict(zip(names, map(results.accuracy, keys), strict=True)),
        (right, "gain in points of top-1"): ingredient_gains(results),
    }
    for (axes, label), estimates in panels.items():
        for y, estimate in enumerate(estimates.values()):
            axes.errorbar(estimate.mean, -y, xerr=estimate.margin, fmt="o", color="C0", capsize=3)
        axes.set_yticks([-y for y in range(len(estimates))], list(estimates))
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    right.axvline(0, color="grey", linewidth=1)
    figure.savefig(path, dpi=90)


def write_tables(rows: list[dict], command: str) -> None:
    """Write results/scene_net.md: one section per training set, with a figure of its ablations."""
    for data, images in dict.fromkeys((row["data"], row["images"]) for row in rows):
        own = [row for row in rows if (row["data"], row["images"]) == (data, images)]
        results = Results(own)
        commits = ", ".join(sorted({str(row["commit"]) for row in own}))
        dates = sorted(row["date"] for row in own)
        text = (
            f"{origin_line(origin(command))}\n\n{len(own)} runs at commit {commits}, {dates[0]} to "
            f"{dates[-1]}, evaluated on {own[0]['judged']} images; scene_net.json has the command "
            "of each. Accuracies in per cent with 95 % intervals over seeds and images.\n\n"
            f"{comparison(results)}\n\n"
        )
        if results.keys_of("ablation"):
            figure = f"scene_net_{data}_{images}.png"
            draw(results, RESULTS / figure)
            text += f"{ablation(results)}\n\n![accuracies and ingredients]({figure})\n"
        write_section("scene_net.md", f"{data}, {images} training images of each category", text)
