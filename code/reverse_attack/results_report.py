"""The tables of an evaluation and its verdict, as JSON and Markdown."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import torch

from deepvision.evaluation.statistics import Paired, wilson
from deepvision.runtime.atomic import write_atomically
from reverse_attack.cost import Cost
from reverse_attack.protocol import BPDA, KNOWN_VIEWS, Result, Table
from utils import relpath

LEVEL = 0.05  # of significance

HEADER = (
    "| {} | | classifier alone, % | {}, % | gain | fixed | broken | p "
    "| forward passes: attack, defence | s: attack, defence |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


def worst_case(table: Table) -> Result:
    """An image is correct only if it is so in every result; the costs are sums.

    Attacks that know the defender's random views are left out: the threat model excludes them.
    """
    results = [r for columns in table.values() for c, r in columns.items() if c != KNOWN_VIEWS]
    attack, defence = Cost(), Cost()
    for result in results:
        attack, defence = attack + result.attack, defence + result.defence
    static, defended = (
        torch.stack([getattr(result, name) for result in results]).all(0)
        for name in ("static", "defended")
    )
    return Result(static, defended, attack, defence)


def as_row(result: Result) -> dict:
    """A result as plain numbers: accuracies in per cent, costs per image."""
    paired, n = Paired.of(result.static, result.defended), len(result.static)
    row: dict = {"n": n}
    for name in ("static", "defended"):
        hits = getattr(result, name).sum().item()
        row |= {name: 100 * hits / n, f"{name}_interval": wilson(hits, n)}
    row |= {"gain": paired.gain, "fixed": paired.fixed, "broken": paired.broken, "p": paired.p}
    for name in ("attack", "defence"):
        cost = getattr(result, name)
        row |= {f"{name}_forward_passes": cost.forward, f"{name}_seconds": cost.seconds}
    return row


def format_row(attack: str, column: str, row: dict) -> str:
    """A row as a line of a Markdown table."""
    static, defended = (
        "{:.1f} [{:.1f}, {:.1f}]".format(row[name], *row[f"{name}_interval"])
        for name in ("static", "defended")
    )
    return (
        f"| {attack} | {column} | {static} | {defended} | {row['gain']:+.1f} | {row['fixed']} "
        f"| {row['broken']} | {row['p']:.2g} "
        f"| {row['attack_forward_passes']:.0f}, {row['defence_forward_passes']:.0f} "
        f"| {row['attack_seconds']:.2f}, {row['defence_seconds']:.2f} |\n"
    )


def format_table(title: str, table: dict, defended: str = "with reversal") -> str:
    """A table in Markdown; `defended` heads the column of the defended accuracy."""
    lines = (format_row(a, c, row) for a, columns in table.items() for c, row in columns.items())
    return HEADER.format(title, defended) + "".join(lines)


def format_verdict(content: dict) -> str:
    """The figures in a sentence, and what they show."""

    def gain(row: dict) -> str:
        return f"{row['gain']:+.1f} (p = {row['p']:.2g})"

    transfer = {attack: columns["transfer"] for attack, columns in content["transfer"].items()}
    clean = transfer.pop("clean")
    gains = ", ".join(f"{attack} {gain(row)}" for attack, row in transfer.items())
    control = content["controls"]
    worst = content["worst_case"]
    if worst["p"] >= LEVEL:
        shown = "no significant difference: against these attacks it is not shown to help or harm"
    elif worst["gain"] > 0:
        shown = "significantly more: the reversal helps against these attacks"
    else:
        shown = "significantly fewer: against attacks that know it, the reversal harms"
    return (
        f"Verdict: against attacks that do not know it (transfer), the reversal gains {gains} "
        f"points; on clean images {gain(clean)}. On PGD-CE's images, reversal by an untrained head "
        f"gains {gain(control['untrained head']['control'])}, noise "
        f"{gain(control['noise']['control'])}. Image-wise worst case over all rows and columns, "
        f"n = {worst['n']}: {worst['defended']:.1f} % with the reversal, {worst['static']:.1f} % "
        f"without (p = {worst['p']:.2g}), {shown}."
    )


def write(stem: Path, record: dict, transfer: Table, controls: Table, adaptive: Table) -> None:
    """Write stem.json and stem.md; print the verdict."""
    tables = {"transfer": transfer, "controls": controls, "adaptive": adaptive}
    rows = {
        name: {a: {c: as_row(r) for c, r in columns.items()} for a, columns in table.items()}
        for name, table in tables.items()
    }
    content = {**record, **rows, "worst_case": as_row(worst_case(adaptive))}
    content["verdict"] = format_verdict(content)
    write_atomically(stem.with_suffix(".json"), (json.dumps(content, indent=2) + "\n").encode())
    write_atomically(stem.with_suffix(".md"), markdown(content).encode())
    print(f"{content['verdict']}\nWritten: {relpath(stem)}.json, .md")


def markdown(content: dict) -> str:
    """The JSON file's content as a page."""
    budget, worst = content["budget"], content["worst_case"]
    steps, n_views = budget["reversal"]
    low, high = worst["defended_interval"]
    parts = [
        f"# What the reversal is worth: protocol {content['protocol']}",
        f"**{worst['defended']:.1f} % [{low:.1f}, {high:.1f}] of {worst['n']} images "
        "withstand every attack of the last table behind their reversal, "
        f"{worst['static']:.1f} % without it.**",
        describe_setting(content),
        "## Attacks that do not know the reversal (transfer, the setting of its paper)",
        f"n = {budget['n']}; reversal: {steps} steps, {n_views} views. PGD: {budget['pgd']} steps, "
        f"APGD: {budget['apgd']}, Square: {budget['queries']} queries; random start, no restarts.",
        format_table("attack", content["transfer"]),
        "## Controls",
        "On PGD-CE's images, or on clean ones where it says so. The true label is unknown at test "
        "time: a ceiling.",
        format_table("instead of the reversal", content["controls"], "with it"),
        "## Attacks that know the reversal",
        describe_adaptive(budget),
        format_table("attack", content["adaptive"]) + format_row("**worst case**", "all", worst),
        content["verdict"],
    ]
    return "\n\n".join(p.strip() if "|" in p else textwrap.fill(p, 100) for p in parts) + "\n"


def describe_setting(content: dict) -> str:
    """Provenance, network, reversal, and what the columns mean."""
    network, arguments = content["classifier"], content["arguments"]
    negatives = {"bank": "a fixed bank", "batch": "the batch"}[arguments["negatives"]]
    start = "random" if arguments["random_start"] else "the image"
    return (
        f"`{content['command']}`, commit {content['commit']}, {content['device']}, torch "
        f"{content['torch']}, {content['date']}. Network {network['arch']} "
        f"(SHA-256 {network['sha256'][:12]}), {'bfloat16' if arguments['bf16'] else 'float32'}. "
        f"Attacks in l∞ of ε = {content['epsilon_255']:g}/255, reversal of twice that, start: "
        f"{start}, negatives: {negatives}, crops from {content['min_crop']:g} of the area. "
        "Accuracy with Wilson's 95 % interval; gain in points, images fixed and broken by the "
        "reversal, exact McNemar p; forward passes (each view counts) and seconds per image."
    )


def describe_adaptive(budget: dict) -> str:
    """The attacks of the adaptive table."""
    steps, n_views = budget["short"]
    shortened = "" if budget["short"] == budget["reversal"] else ", shortened to be affordable"
    known = (
        f" {KNOWN_VIEWS}: the same steps, without EOT, on the views that the defender will draw; "
        "outside the threat model, so not part of the worst case."
    )
    return (
        f"n = {budget['n_adaptive']}, the first of those above; reversal: {steps} steps, "
        f"{n_views} views{shortened}, and transfer measured again on it. Aware: {budget['aware']} "
        "steps that also keep the contrastive loss low, times λ. "
        f"{BPDA}: {budget['bpda']} steps through the reversal, each over {budget['draws']} draws "
        f"of its views.{known if budget['known_views'] else ''} "
        f"Square: {budget['defended_queries']} queries of the defended classifier. Each attack's "
        "images are classified without and with the reversal; the last row counts an image as "
        "correct only if it is so in all rows above."
    )
