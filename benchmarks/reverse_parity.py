"""Part IV's l_1 and l_2 attacks beside foolbox's and torchattacks', on the newest classifier:

    python benchmarks/reverse_parity.py [--data-root ../data] [--limit 200]

Writes a section of results/reverse_parity.md: accuracy left with Wilson's 95 % interval, by the
attacks' budgets of l_1 = 12 and l_2 = 0.5 on images in [0, 1]. Both libraries are optional:
pip install foolbox torchattacks.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
from results_file import ROOT, provenance, write_section
from torch import Tensor, nn

sys.path.insert(1, str(ROOT / "code"))
from deepvision.attacks.pgd import APGD, PGD  # noqa: E402
from reverse_attack import classifier, data, options  # noqa: E402
from reverse_attack.intervals import percent  # noqa: E402
from reverse_attack.reversal import BUDGETS, pixels_of  # noqa: E402

STEPS = (20, 100)


def ours(model: nn.Module) -> Iterator[tuple[str, str, Callable]]:
    """(norm, name, perturb) of each attack of this project."""
    for norm in ("l1", "l2"):
        common = {"norm": norm, "epsilon": BUDGETS[norm], "pixels": pixels_of(norm)}
        for steps in STEPS:
            for kind in (PGD, APGD):
                generator = torch.Generator().manual_seed(0)
                attack = kind(steps=steps, random_start=True, generator=generator, **common)
                name = f"{kind.__name__}, {steps} steps"
                yield norm, name, lambda x, y, attack=attack: attack.perturb(model, x, y)


class PlainLayout(nn.Module):
    """The model with gradients in the default memory layout, which torchattacks relies on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        if x.requires_grad:
            x.register_hook(torch.Tensor.contiguous)
        return self.model(x)


def of_torchattacks(model: nn.Module) -> Iterator[tuple[str, str, Callable]]:
    try:
        import torchattacks
    except ImportError:
        return
    model, epsilon = PlainLayout(model).eval(), BUDGETS["l2"]
    for steps in STEPS:
        step = 2.5 * epsilon / steps
        yield (
            "l2",
            f"torchattacks PGDL2, {steps} steps",
            torchattacks.PGDL2(model, eps=epsilon, alpha=step, steps=steps),
        )
        yield (
            "l2",
            f"torchattacks APGD, {steps} steps",
            torchattacks.APGD(model, norm="L2", eps=epsilon, steps=steps),
        )


def of_foolbox(model: nn.Module) -> Iterator[tuple[str, str, Callable]]:
    try:
        import foolbox
    except ImportError:
        return
    target = foolbox.PyTorchModel(model, bounds=(0, 1))
    attacks = foolbox.attacks
    kinds = {
        "l1": (attacks.L1PGD, attacks.SparseL1DescentAttack),
        "l2": (attacks.L2PGD,),
    }
    for norm, members in kinds.items():
        for kind in members:
            for steps in STEPS:
                attack = kind(rel_stepsize=2.5 / steps, steps=steps, random_start=True)

                def perturb(x: Tensor, y: Tensor, attack=attack, norm=norm) -> Tensor:
                    return attack(target, x, y, epsilons=BUDGETS[norm])[1]

                yield norm, f"foolbox {kind.__name__}, {steps} steps", perturb


def main() -> None:
    parser = options.parser(__doc__.split("\n")[0], 100)
    sys.exit(options.run(measure, parser.parse_args()))


def measure(args: Namespace) -> None:
    device = options.choose_device(args.device)
    listing = data.list_images(args.dataset, args.data_root, "test")
    model = classifier.from_args(args, len(listing.classes), device).model
    images = listing.sample(args.seed, args.limit or 200)
    lines = ["| norm | attack | accuracy left, % | s an image |", "|---|---|---|---|"]
    for norm, name, perturb in [*ours(model), *of_torchattacks(model), *of_foolbox(model)]:
        start, hits = time.perf_counter(), 0
        for x, y in images.batches(args.batchsize):
            x_adv = perturb(x.to(device), y.to(device))
            with torch.no_grad():
                hits += (model(x_adv).argmax(1).cpu() == y).sum().item()
        seconds = (time.perf_counter() - start) / len(images)
        lines.append(f"| {norm} | {name} | {percent(hits, len(images))} | {seconds:.2f} |")
        print(lines[-1], flush=True)
    budgets = ", ".join(f"{norm} = {BUDGETS[norm]:g}" for norm in ("l1", "l2"))
    head = f"{args.arch} on {len(images)} test images of {args.dataset}; {budgets}; random start."
    text = "\n".join([head, "", *lines, "", provenance()])
    write_section("reverse_parity.md", "l_1 and l_2 attacks beside public libraries", text)


if __name__ == "__main__":
    main()
