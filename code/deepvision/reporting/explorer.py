"""The explorer of attacks: what the sliders of the page show, computed for some images of a run.

Each image is attacked by untargeted PGD at every point of a grid over ε and steps, and by the
assignment's default attack. Attacked images are rounded to 8 bits before the network sees them,
so that the page shows its input exactly.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from custom_transforms import IMAGENET_MEAN, IMAGENET_STD
from deepvision.attacks import PGD, accuracy_under_attack
from deepvision.attacks.norms import InputScale
from deepvision.evaluation.pictures import normalised, overlay, pixels
from deepvision.evaluation.saliency import grad_cam, saliency
from deepvision.models import student
from deepvision.reporting.analysis import RunAnalysis
from deepvision.reporting.document import png_data

EPSILONS = (0, 1, 2, 4, 8, 16)  # 8-bit intensity levels
STEPS = (1, 2, 5, 10, 20)
MIDDLE = 4, 5  # ε and steps that decide whether an image falls or holds
EACH = 4  # images that fell, and images that held
CANDIDATES = 32  # images of which they are chosen, twice: evenly spread and most confident
PROBED = 50  # images of the accuracies, where the run has no sweep
TOP = 3  # predictions shown

ATTACK = PGD(norm="linf", epsilon=4, pixels=InputScale("255", IMAGENET_MEAN, IMAGENET_STD))


def explore(a: RunAnalysis) -> dict | None:
    """The data of the explorer, for the page's JavaScript; None if no image was recognised.

    An image has its clean picture and a sheet: the differences attacked - clean, modulo 256, of
    every point and of the default attack below each other, as PNG without loss.
    """
    indices, held = choose(a)
    if not indices:
        return None
    x, y = a.images.images(indices)
    clean = pixels(x)
    attacked = [*grid(a.run.network, x, y), pixels(default_attack(a.run.network, x))]
    top = [top_predictions(a, images) for images in (clean, *attacked)]  # [point][image]
    maps = {"Gradient": saliency(a.run.network, x)[0], "Grad-CAM": grad_cam(a.run.network, x)}
    maps = {name: overlay(clean, m) for name, m in maps.items() if m is not None}
    images = [
        {
            "label": a.predictions.names[y[i]],
            "held": bool(held[i]),
            "clean": png_data(clean[i]),
            "sheet": png_data(np.concatenate([images[i] - clean[i] for images in attacked])),
            "top": [predictions[i] for predictions in top],
            "maps": {name: png_data(shown[i]) for name, shown in maps.items()},
        }
        for i in range(len(indices))
    ]
    grid_values = {"epsilons": EPSILONS, "steps": STEPS, "images": images}
    return grid_values | {"accuracy": accuracies(a), "budget": default_budget(clean, attacked[-1])}


def choose(a: RunAnalysis) -> tuple[list[int], list[bool]]:
    """Up to EACH recognised images that fall at MIDDLE and as many that hold; whether each holds.

    Falling images come from all classes; holding ones are rare, and sought among the most
    confident predictions, too.
    """
    p = a.predictions
    right = np.flatnonzero(p.labels == p.predictions)
    if not len(right):
        return [], []
    spread = right[np.linspace(0, len(right) - 1, min(CANDIDATES, len(right))).astype(int)]
    confident = right[np.argsort(-p.confidence[right], kind="stable")][:CANDIDATES]
    candidates = list(dict.fromkeys([*spread.tolist(), *confident.tolist()]))
    x, y = a.images.images(candidates)
    epsilon, steps = MIDDLE
    images = pixels(replace(ATTACK, epsilon=epsilon, steps=steps).perturb(a.run.network, x, y))
    holds = (a.logits(normalised(images)).argmax(1) == y).tolist()
    fell = [i for i, h in zip(candidates, holds, strict=True) if not h][:EACH]
    held = [i for i, h in zip(candidates, holds, strict=True) if h][:EACH]
    return fell + held, [False] * len(fell) + [True] * len(held)


def points() -> list[tuple[int, int]]:
    """(ε, steps) of the grid without ε = 0, in the order of the page's JavaScript."""
    return [(epsilon, steps) for epsilon in EPSILONS[1:] for steps in STEPS]


def grid(model: nn.Module, x: Tensor, y: Tensor) -> list[np.ndarray]:
    """The attacked images, uint8 (N, H, W, 3), of each of `points`."""
    attacks = (replace(ATTACK, epsilon=epsilon, steps=steps) for epsilon, steps in points())
    return [pixels(attack.perturb(model, x, y)) for attack in attacks]


def default_attack(model: nn.Module, x: Tensor) -> Tensor:
    """x (N, 3, H, W) after the attack of the assignment."""
    attack = student.default_attack(nn.CrossEntropyLoss())
    return attack.perturb(model, x.clone()).detach()


def default_budget(clean: np.ndarray, attacked: np.ndarray) -> str:
    """The ε of the default attack as text, and the largest change it made in 8-bit levels."""
    epsilon = getattr(student.default_attack(nn.CrossEntropyLoss()), "epsilon", None)
    largest = np.abs(attacked.astype(int) - clean).max()
    known = "" if epsilon is None else f"ε = {epsilon:g} in normalised units, "
    return f"{known}at most {largest} of 255 levels"


def top_predictions(a: RunAnalysis, images: np.ndarray) -> list[list[tuple[str, float]]]:
    """For each uint8 image (N, H, W, 3) its TOP classes with their probabilities."""
    values, labels = (
        a.logits(normalised(images)).softmax(1).topk(min(TOP, len(a.predictions.names)))
    )
    names = a.predictions.names
    return [
        [(names[k], round(p, 4)) for p, k in zip(*row, strict=True)]
        for row in zip(values.tolist(), labels.tolist(), strict=True)
    ]


def accuracies(a: RunAnalysis) -> dict:
    """Accuracy in per cent over EPSILONS (rows) and STEPS (columns), and under the default attack.

    The grid is that of the run's own sweep (`-a --sweep`), if it has one.
    """
    count = len(a.predictions.labels)
    indices = np.linspace(0, count - 1, min(PROBED, count)).astype(int)
    x, y = a.images.images(indices)
    model = a.run.network
    default = accuracy_under_attack(model, None, default_attack(model, x), y)
    recorded = recorded_sweep(a.run.sweep())
    if recorded:
        return recorded | {"default": default, "default_images": len(y)}
    rows = [[accuracy_under_attack(model, None, x, y)] * len(STEPS)]
    for epsilon in EPSILONS[1:]:
        attacks = [replace(ATTACK, epsilon=epsilon, steps=s, early_stop=True) for s in STEPS]
        rows.append([accuracy_under_attack(model, attack, x, y) for attack in attacks])
    return {"grid": rows, "images": len(y), "default": default, "default_images": len(y)}


def recorded_sweep(row: dict | None) -> dict | None:
    """The grid of an untargeted l_inf sweep in evaluations.jsonl; None if a point is missing."""
    if not row or not ("l_inf" in row["attack"] and "untargeted" in row["attack"]):
        return None
    found = {(p["epsilon_255"], p["steps"]): p["top1"] for p in row["sweep"]}
    if not {(0, 0), *points()} <= found.keys():
        return None
    rows = [
        [found[(epsilon, steps) if epsilon else (0, 0)] for steps in STEPS] for epsilon in EPSILONS
    ]
    return {"grid": rows, "images": row["probed"]}
