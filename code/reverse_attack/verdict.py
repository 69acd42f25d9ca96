"""The tables of an evaluation and what they amount to in words, as JSON and Markdown."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import torch

from deepvision.attacks.diagnostics import wilson
from deepvision.checkpoint import write_atomically
from reverse_attack.intervals import Paired
from reverse_attack.protocol import BPDA, Cost, Result, Table
from utils import relpath

LEVEL = 0.05  # of significance

HEADER = (
    "| {} | | classifier alone, % | {}, % | gain | fixed | broken | p "
    "| passes: attack, defence | s: attack, defence |\n|---|---|---|---|---|---|---|---|---|---|\n"
)


def worst(table: Table) -> Result:
    """For each image, right only if every result of the table has it right; costs summed up."""
    results = [result for columns in table.values() for result in columns.values()]
    attack, defence = Cost(), Cost()
    for result in results:
        attack, defence = attack + result.attack, defence + result.defence
    static, defended = (
        torch.stack([getattr(result, answers) for result in results]).all(0)
        for answers in ("static", "defended")
    )
    return Result(static, defended, attack, defence)


def row_of(result: Result) -> dict:
    """A result as plain numbers; shares in per cent."""
    paired, n = Paired.of(result.static, result.defended), len(result.static)
    row: dict = {"n": n}
    for name in ("static", "defended"):
        hits = getattr(result, name).sum().item()
        row |= {name: 100 * hits / n, f"{name}_interval": wilson(hits, n)}
    row |= {"gain": paired.gain, "fixed": paired.fixed, "broken": paired.broken, "p": paired.p}
    for name in ("attack", "defence"):
        cost = getattr(result, name)
        row |= {f"{name}_passes": cost.passes, f"{name}_seconds": cost.seconds}
    return row


def line_of(attack: str, column: str, row: dict) -> str:
    static, defended = (
        "{:.1f} [{:.1f}, {:.1f}]".format(row[name], *row[f"{name}_interval"])
        for name in ("static", "defended")
    )
    return (
        f"| {attack} | {column} | {static} | {defended} | {row['gain']:+.1f} | {row['fixed']} "
        f"| {row['broken']} | {row['p']:.2g} "
        f"| {row['attack_passes']:.0f}, {row['defence_passes']:.0f} "
        f"| {row['attack_seconds']:.2f}, {row['defence_seconds']:.2f} |\n"
    )


def lines_of(title: str, table: dict, after: str = "with reversal") -> str:
    lines = (line_of(a, c, row) for a, columns in table.items() for c, row in columns.items())
    return HEADER.format(title, after) + "".join(lines)


def in_words(content: dict) -> str:
    """The verdict: the figures and which way they point, whichever it is."""

    def gain(row: dict) -> str:
        return f"{row['gain']:+.1f} (p = {row['p']:.2g})"

    transfer = {attack: columns["transfer"] for attack, columns in content["transfer"].items()}
    clean = transfer.pop("clean")
    gains = ", ".join(f"{attack} {gain(row)}" for attack, row in transfer.items())
    control = content["controls"]
    last = content["worst_case"]
    if last["p"] >= LEVEL:
        what = "no significant difference: against these attacks it is not shown to help or to harm"
    elif last["gain"] > 0:
        what = "significantly more: the reversal helps against these attacks"
    else:
        what = "significantly fewer: against attacks that know of it, the reversal harms"
    return (
        f"Verdict: against attacks that do not know of it (transfer), the reversal gains {gains} "
        f"points; on clean images {gain(clean)}. On PGD-CE's images, reversal by an untrained head "
        f"gains {gain(control['untrained head']['control'])}, noise "
        f"{gain(control['noise']['control'])}. Image-wise worst case over all rows and columns, "
        f"n = {last['n']}: {last['defended']:.1f} % with the reversal, {last['static']:.1f} % "
        f"without (p = {last['p']:.2g}), {what}."
    )


def write(stem: Path, about: dict, plain: Table, controls: Table, adaptive: Table) -> None:
    """stem.json and stem.md; prints the verdict."""
    tables = {"transfer": plain, "controls": controls, "adaptive": adaptive}
    rows = {
        name: {a: {c: row_of(r) for c, r in columns.items()} for a, columns in table.items()}
        for name, table in tables.items()
    }
    content = {**about, **rows, "worst_case": row_of(worst(adaptive))}
    content["verdict"] = in_words(content)
    write_atomically(stem.with_suffix(".json"), (json.dumps(content, indent=2) + "\n").encode())
    write_atomically(stem.with_suffix(".md"), markdown(content).encode())
    print(f"{content['verdict']}\nWritten: {relpath(stem)}.json, .md")


def markdown(content: dict) -> str:
    """What the JSON file holds, for readers."""
    size, network, headline = content["size"], content["classifier"], content["worst_case"]
    (steps, n_views), (short_steps, short_views) = size["reversal"], size["short"]
    low, high = headline["defended_interval"]
    shortened = "" if size["short"] == size["reversal"] else ", shortened to be affordable"
    parts = [
        f"# What the reversal is worth: protocol {content['protocol']}",
        f"**{headline['defended']:.1f} % [{low:.1f}, {high:.1f}] of {headline['n']} images "
        "withstand every attack of the last table behind its reversal, "
        f"{headline['static']:.1f} % without it.**",
        f"`{content['command']}`, commit {content['commit']}, {content['device']}, torch "
        f"{content['torch']}, {content['date']}. Network {network['arch']} "
        f"(SHA-256 {network['sha256'][:12]}), "
        f"{'bfloat16' if content['arguments']['bf16'] else 'float32'}. "
        f"Attacks in l∞ of ε = {content['epsilon_255']:g}/255, reversal of twice that, its "
        "negatives a fixed bank. Accuracy with Wilson's 95 % interval; gain in points, images "
        "fixed and broken by the reversal, exact McNemar p; passes (forward and backward) and "
        "seconds an image.",
        "## Attacks that do not know of the reversal (transfer, the setting of its paper)",
        f"n = {size['n']}; reversal: {steps} steps, {n_views} views. PGD: {size['pgd']} steps, "
        f"APGD: {size['apgd']}, Square: {size['queries']} queries; random start, no restarts.",
        lines_of("attack", content["transfer"]),
        "## Controls",
        "On what PGD-CE made, unless it says clean. The true label is known to nobody: a ceiling.",
        lines_of("instead of the reversal", content["controls"], "with it"),
        "## Attacks that know of it",
        f"n = {size['n_adaptive']}, the first of those above; reversal: {short_steps} steps, "
        f"{short_views} views{shortened}, and transfer measured again on it. Aware: "
        f"{size['aware']} steps that also keep the contrastive loss low, times λ. {BPDA}: "
        f"{size['bpda']} steps through the reversal, each over {size['draws']} draws of its views. "
        f"Square: {size['defended_queries']} queries of the defended classifier. Each attack's "
        "images are judged without and with the reversal; the last row counts an image as right "
        "only if it is so in all rows above.",
        lines_of("attack", content["adaptive"]) + line_of("**worst case**", "all", headline),
        content["verdict"],
    ]
    return "\n\n".join(p.strip() if "|" in p else textwrap.fill(p, 100) for p in parts) + "\n"
