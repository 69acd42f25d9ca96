"""AutoAttack, ours and the official one, on CIFAR-10 classifiers of Part IV, image by image:

    python benchmarks/autoattack.py --data-root ../data plain=FILE robust=FILE [--limit 200]

Writes a section of results/autoattack.md for each network and norm: what is left after each attack,
the images that only one side breaks, CPU time and forward passes. With --square P ... it compares
Square alone for several p instead. --shrink 8 divides every ε by 8, for plain networks. The
official code is the package pyautoattack (pip install --no-deps pyautoattack).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from results_file import origin, origin_line, write_section
from torch import Tensor, nn

from deepvision.attacks import AutoAttack, InputScale, Square, correct_under_attack
from deepvision.config import OneLineParser
from deepvision.config import norm as norm_name
from deepvision.evaluation.statistics import percent
from deepvision.evaluation.sweep import format_budget
from deepvision.runtime.provenance import command_line
from reverse_attack import classifier, data
from reverse_attack.cost import Cost

PIXELS = InputScale("255", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
EPSILONS = {"linf": 8.0, "l2": 0.5 * 255, "l1": 12.0 * 255}  # of 255
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
BATCH = 100

Left = dict[str, Tensor]  # attack -> where (N,) the prediction is right after it


class Counted(nn.Module):
    """A model that counts images; its gradients have the layout that the official code needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W)."""
        self.images += len(x)
        x = x.clone()
        if x.requires_grad:
            x.register_hook(torch.Tensor.contiguous)
        return self.model(x)


def ours(model: nn.Module, norm: str, epsilon: float, queries: int, x: Tensor, y: Tensor) -> Left:
    """The standard set of deepvision.attacks."""
    suite = AutoAttack(norm=norm, epsilon=epsilon, pixels=PIXELS, queries=queries, batch_size=BATCH)
    fell_to = suite.run(model, x, y).fell_to
    fell_at = torch.tensor([place(name) for name in fell_to])
    return {name: fell_at > i for i, name in enumerate(("clean", *ATTACKS))}


def place(name: str | None) -> int:
    """Where in the sequence an image fell; after the last attack if it is still right."""
    names = ("clean", *ATTACKS)
    return len(names) if name is None else names.index(name.split(" ")[0])


def official(
    model: nn.Module, norm: str, epsilon: float, queries: int, x: Tensor, y: Tensor
) -> Left:
    """The standard version of the official code, one attack at a time to see what each breaks."""
    from pyautoattack import AutoAttack as Official

    options = {"norm": norm.capitalize(), "eps": epsilon / 255, "seed": 0}
    attack = Official(model, version="standard", device="cpu", **options)
    attack.square.n_queries = queries
    right = correct_under_attack(model, None, x, y)
    left = {"clean": right.clone()}
    for name in ATTACKS:
        attack.attacks_to_run = [name]
        if right.any():
            images, labels = x[right], y[right]
            x_adv, _ = attack.run_standard_evaluation(images, labels, batch_size=BATCH)
            right[right.clone()] = correct_under_attack(model, None, x_adv, labels)
        left[name] = right.clone()
    return left


def measured(attack: Callable[..., Left], model: nn.Module, *args) -> tuple[Left, Cost]:
    """What `attack` leaves, and its cost per image; the seconds are the CPU's."""
    counted, start = Counted(model).eval(), time.process_time()
    left = attack(counted, *args)
    n = len(left["clean"])
    return left, Cost(counted.images / n, (time.process_time() - start) / n)


def compare(model: nn.Module, norm: str, epsilon: float, queries: int, x: Tensor, y: Tensor) -> str:
    """The table of one network in one norm, in Markdown."""
    (left, cost), (theirs, their_cost) = (
        measured(attack, model, norm, epsilon, queries, x, y) for attack in (ours, official)
    )
    lines = [
        f"{format_budget(norm, epsilon, PIXELS.std)}; {len(y)} images; Square with "
        f"{queries} queries on both sides{'' if queries == 5000 else ' (5,000 in the standard)'}.",
        "",
        "| after | ours: accuracy left, % | official | right after the official only | ours only |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, a in left.items():
        b = theirs[name]
        accuracies = (percent(v.sum().item(), len(y)) for v in (a, b))
        only = ((b & ~a).sum().item(), (a & ~b).sum().item())
        lines.append(f"| {name} | {' | '.join(map(str, (*accuracies, *only)))} |")
    costs = (("forward passes", "forward", ",.0f"), ("CPU seconds", "seconds", ".2f"))
    for name, key, form in costs:
        values = (f"{getattr(c, key):{form}}" for c in (cost, their_cost))
        lines.append(f"| {name} per image | {' | '.join(values)} | | |")
    return "\n".join(lines)


def compare_square(
    model: nn.Module,
    norm: str,
    epsilon: float,
    queries: int,
    x: Tensor,
    y: Tensor,
    shares: list[float],
) -> str:
    """Square alone with each p, on the images that are right without an attack, in Markdown."""
    right = correct_under_attack(model, None, x, y)
    x, y = x[right], y[right]
    lines = [
        f"{format_budget(norm, epsilon, PIXELS.std)}; {len(y)} images, {queries} queries.",
        "",
        "| p | accuracy left, % |",
        "|---:|---:|",
    ]
    for p in shares:
        generator = torch.Generator().manual_seed(0)
        options = {"norm": norm, "epsilon": epsilon, "pixels": PIXELS}
        attack = Square(p=p, steps=queries - 1, generator=generator, **options)
        left = correct_under_attack(model, attack, x, y).sum().item()
        lines.append(f"| {p:g} | {percent(left, len(y))} |")
    return "\n".join(lines)


def describe(loaded: classifier.LoadedClassifier) -> str:
    """The network: architecture, checksum, precision."""
    precision = "bfloat16" if loaded.model.bf16 else "float32"
    return f"Network {loaded.arch}, SHA-256 {loaded.sha256[:12]}, {precision}"


def main(argv: Sequence[str]) -> None:
    """Compare on all networks and norms that the command line names."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("networks", nargs="+", metavar="NAME=FILE", help="checkpoints")
    parser.add_argument("--data-root", type=Path, required=True, help="holds cifar10/")
    parser.add_argument("--limit", type=int, default=200, help="images")
    parser.add_argument(
        "--norms", nargs="+", type=norm_name, default=list(EPSILONS), help="default: all"
    )
    parser.add_argument("--queries", type=int, default=5000, help="of Square; default 5000")
    parser.add_argument("--shrink", type=float, default=1.0, help="divides ε; default 1")
    parser.add_argument("--bf16", action="store_true", help="networks compute in bfloat16")
    parser.add_argument("--square", nargs="+", type=float, metavar="P", help="Square alone")
    args = parser.parse_args(argv[1:])
    logging.disable()  # the official code reports each batch
    images = data.list_images("cifar10", args.data_root, "test").sample(0, args.limit)
    x, y = (torch.cat(parts) for parts in zip(*images.batches(BATCH), strict=True))
    for name, _, file in (network.partition("=") for network in args.networks):
        loaded = classifier.load(Path(file), "narrow", 10, args.bf16)
        source = origin_line(origin(command_line(argv)))
        for norm in args.norms:
            title = f"{name}, l_{norm[1:]}{', Square alone' if args.square else ''}"
            setting = (loaded.model, norm, EPSILONS[norm] / args.shrink, args.queries, x, y)
            text = compare_square(*setting, args.square) if args.square else compare(*setting)
            text += f"\n\n{describe(loaded)}. CIFAR-10, {source}"
            write_section("autoattack.md", title, text)
            print(title, text, sep="\n", flush=True)


if __name__ == "__main__":
    main(sys.argv)
