"""AutoAttack, ours and torchattacks', on CIFAR-10 classifiers of Part IV, image by image:

    python benchmarks/autoattack.py --data-root ../data plain=FILE robust=FILE [--limit 200]

Writes a section of results/autoattack.md for each network and norm: accuracy left after each attack
of ours, accuracy left by torchattacks' AutoAttack, and the images on which the two disagree.
torchattacks is optional (pip install torchattacks); it has no l_1. Ours can be interrupted: it
continues from results/autoattack/*.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from results_file import ROOT, provenance, write_section
from torch import Tensor, nn

from deepvision.attacks import AutoAttack, InputScale
from deepvision.evaluation.robust_eval import evaluate_robustness
from deepvision.evaluation.statistics import percent
from reverse_attack import classifier, data

PIXELS = InputScale("255", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
EPSILONS = {"linf": 8.0, "l2": 0.5 * 255, "l1": 12.0 * 255}  # of 255
BATCH = 100


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


def theirs(model: nn.Module, norm: str, x: Tensor, y: Tensor) -> tuple[Tensor, float] | None:
    """Where (N,) torchattacks' AutoAttack leaves the prediction right, and its seconds."""
    if norm == "l1":
        return None
    try:
        import torchattacks
    except ImportError:
        return None
    attack = torchattacks.AutoAttack(
        PlainLayout(model).eval(),
        norm={"linf": "Linf", "l2": "L2"}[norm],
        eps=EPSILONS[norm] / 255,
        version="standard",
        n_classes=10,
        seed=0,
    )
    start, right = time.perf_counter(), []
    for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        x_adv = attack(images, labels)
        with torch.no_grad():
            right.append(model(x_adv).argmax(1) == labels)
    return torch.cat(right), time.perf_counter() - start


def compare(name: str, model: nn.Module, norm: str, x: Tensor, y: Tensor, store: Path) -> str:
    """One section of Markdown: our table, and the public library's figure."""
    attack = AutoAttack(norm=norm, epsilon=EPSILONS[norm], pixels=PIXELS, batch_size=BATCH)
    result = evaluate_robustness(model, x, y, attack, store / f"{name}_{norm}.json")
    lines = [f"{name}: {result.summary()}.", "", result.format_table(), ""]
    ours = torch.tensor([fell_to is None for fell_to in result.progress.fell_to])
    if public := theirs(model, norm, x, y):
        right, seconds = public
        only_ours, only_theirs = (right & ~ours).sum().item(), (ours & ~right).sum().item()
        lines += [
            f"torchattacks leaves {percent(right.sum().item(), len(y))} % "
            f"({seconds / len(y):.2f} s per image). {only_ours} images fell to ours only, "
            f"{only_theirs} to torchattacks' only.",
            "",
        ]
    return "\n".join([*lines, provenance()])


def main() -> None:
    """Compare on all networks and norms that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--data-root", type=Path, required=True, help="holds cifar10/")
    parser.add_argument("--limit", type=int, default=200, help="images")
    parser.add_argument("--norms", nargs="+", choices=EPSILONS, default=list(EPSILONS))
    args = parser.parse_args()
    images = data.list_images("cifar10", args.data_root, "test").sample(0, args.limit)
    x, y = (torch.cat(parts) for parts in zip(*images.batches(BATCH), strict=True))
    store = ROOT / "results" / "autoattack"
    store.mkdir(parents=True, exist_ok=True)
    for name, _, file in (network.partition("=") for network in args.networks):
        model = classifier.load(Path(file), "narrow", 10).model
        for norm in args.norms:
            text = compare(name, model, norm, x, y, store)
            write_section("autoattack.md", f"{name}, l_{norm[1:]}", text)
            print(text, flush=True)


if __name__ == "__main__":
    main()
