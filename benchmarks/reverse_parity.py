"""Part IV's l_1 and l_2 attacks compared with foolbox's and torchattacks', on one classifier:

    python benchmarks/reverse_parity.py [--data-root ../data] [--limit 200]

Writes a section of results/reverse_parity.md: the robust accuracy with Wilson's 95 % interval, for
l_1 = 12 and l_2 = 0.5 on images in [0, 1], and the cost per image. The classifier is the newest one
that train.py left. Both libraries are optional: pip install foolbox torchattacks.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
from results_file import ROOT, provenance, write_section
from torch import Tensor, nn

sys.path.insert(1, str(ROOT / "code"))
from deepvision.attacks import APGD, PGD  # noqa: E402
from deepvision.evaluation.statistics import percent  # noqa: E402
from deepvision.runtime.run_dir import LOGS  # noqa: E402
from reverse_attack import classifier, data, options  # noqa: E402
from reverse_attack.cost import measure_cost  # noqa: E402
from reverse_attack.reversal import BUDGETS, input_scale  # noqa: E402

STEPS = (20, 100)


def ours(model: nn.Module) -> Iterator[tuple[str, str, Callable]]:
    """(norm, name, perturb) of each attack of this project."""
    for norm in ("l1", "l2"):
        common = {"norm": norm, "epsilon": BUDGETS[norm], "pixels": input_scale(norm)}
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
        """Logits (N, K) of images (N, C, H, W)."""
        x = x.clone()
        if x.requires_grad:
            x.register_hook(torch.Tensor.contiguous)
        return self.model(x)


def of_torchattacks(model: nn.Module) -> Iterator[tuple[str, str, Callable]]:
    """The same of torchattacks, if it is installed."""
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
    """The same of foolbox, if it is installed."""
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


def measure(args: Namespace) -> None:
    """Run every attack on the same images and write the section."""
    index = data.list_images(args.dataset, args.data_root, "test")
    model = classifier.from_args(args, len(index.classes)).model
    images = index.sample(args.seed, args.limit)
    lines = [
        "| norm | attack | robust accuracy, % | forward passes per image | s per image |",
        "|---|---|---|---|---|",
    ]
    for norm, name, perturb in [*ours(model), *of_torchattacks(model), *of_foolbox(model)]:
        with measure_cost(model, len(images)) as cost:
            batches = images.batches(args.batch_size)
            attacked = [perturb(x.to(args.device), y.to(args.device)) for x, y in batches]
        with torch.no_grad():
            predictions = torch.cat([model(x_adv).argmax(1).cpu() for x_adv in attacked])
        accuracy = percent((predictions == images.y).sum().item(), len(images))
        lines.append(f"| {norm} | {name} | {accuracy} | {cost.forward:.0f} | {cost.seconds:.2f} |")
        print(lines[-1], flush=True)
    budgets = ", ".join(f"{norm} = {BUDGETS[norm]:g}" for norm in ("l1", "l2"))
    setting = f"{args.arch}, {len(images)} test images of {args.dataset}; {budgets}; random start."
    text = "\n".join([setting, "", *lines, "", provenance()])
    write_section("reverse_parity.md", "l_1 and l_2 attacks compared with public libraries", text)


def main() -> int:
    """Run the command; return the exit status."""
    parser = options.make_parser(__doc__, 100)
    parser.set_defaults(limit=200)
    return options.run(measure, options.parse(parser, sys.argv[1:], "reverse_parity.py"), LOGS)


if __name__ == "__main__":
    sys.exit(main())
