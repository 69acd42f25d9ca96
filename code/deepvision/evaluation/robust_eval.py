"""AutoAttack as an evaluation that can be stopped and resumed.

    attack = AutoAttack(norm="linf", epsilon=8, pixels=InputScale("255", mean, std))
    result = evaluate_robustness(model, x, y, attack, Path("robustness.json"))
    print(result.summary())

The JSON file holds for each image which attack it fell to. It is written after each attack on each
batch; the same call with the same file continues, and ends with the same result as one go.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from deepvision.attacks import AutoAttack, Progress
from deepvision.attacks.pgd import Model
from deepvision.evaluation.statistics import percent
from deepvision.evaluation.sweep import format_budget
from deepvision.runtime.atomic import write_atomically
from deepvision.runtime.run_dir import run_dirs
from utils import UserError


@dataclass(frozen=True)
class RobustResult:
    """What an evaluation found: the attack, and which image fell to which part of it."""

    attack: AutoAttack
    progress: Progress

    def summary(self) -> str:
        """Norm, ε, version, images, accuracies with 95 % intervals, and cost, in one line."""
        p, a = self.progress, self.attack
        levels = {"255": 1, "pixel": 255}.get(a.pixels.unit)
        budget = f"l_{a.norm[1:]}, ε = {a.epsilon:g} in normalised units"
        if levels:
            budget = format_budget(a.norm, levels * a.epsilon, a.pixels.std)
        return (
            f"AutoAttack {a.version}, {budget}, {p.n} images: robust accuracy "
            f"{percent(p.robust, p.n)} %, clean {percent(p.clean, p.n)} %; "
            f"{p.seconds / p.n:.2f} s and {p.forward_passes / p.n:,.0f} forward passes per image"
        )

    def format_table(self) -> str:
        """How many images fell to each attack, in Markdown; each saw those that were left."""
        p = self.progress
        fallen, left = Counter(p.fell_to), p.n
        lines = ["| attack | fell to it | accuracy left, % |", "|---|---:|---:|"]
        for name in ["clean", *p.attacks]:
            left -= fallen[name]
            lines.append(f"| {name} | {fallen[name]} | {percent(left, p.n)} |")
        return "\n".join(lines)


def evaluate_robustness(
    model: Model, x: Tensor, y: Tensor, attack: AutoAttack, path: Path | None = None
) -> RobustResult:
    """Run `attack` on x (N, C, H, W) with labels y (N,); continue what `path` holds, if it exists.

    Raises:
        UserError: `path` is unreadable, or is of another network, other images or other settings.
        ValueError: x is empty, or does not fit the pixel range of the attack.
    """
    settings = describe_run(model, x, y, attack)
    progress = load_progress(path, settings) if path else None
    with progress_bar(model, f"AutoAttack {attack.version}") as bar:

        def on_progress(p: Progress, name: str) -> None:
            if path:
                content = json.dumps({"settings": settings, "progress": asdict(p)}, indent=1)
                write_atomically(path, content.encode())
            bar.total = bar.n + p.passes_left
            bar.set_postfix_str(f"{name}: {p.accuracy:.1f} % left")

        progress = attack.run(model, x, y, progress, on_progress)
    return RobustResult(attack, progress)


@contextlib.contextmanager
def progress_bar(model: Model, title: str) -> Iterator[tqdm]:
    """A bar that counts the forward passes of single images; its total follows later."""
    options = {"unit": "pass", "unit_scale": True, "smoothing": 0, "leave": False, "disable": None}
    with tqdm(desc=title, **options) as bar, contextlib.ExitStack() as stack:

        def count(_, inputs: tuple) -> None:
            bar.update(len(inputs[0]))

        if isinstance(model, nn.Module):
            stack.callback(model.register_forward_pre_hook(count).remove)
        yield bar


def describe_run(model: Model, x: Tensor, y: Tensor, attack: AutoAttack) -> dict:
    """All that the result follows from: settings, and checksums of images and weights."""
    settings = asdict(attack)
    settings["pixels"] = json.loads(json.dumps(settings["pixels"]))  # tuples to lists
    weights = model.state_dict().values() if isinstance(model, nn.Module) else ()
    return settings | {"images": _checksum([x, y]), "network": _checksum(weights)}


def run_dir_of_network(model: nn.Module, logs: Path) -> Path | None:
    """The newest folder evaluation_exp_* below `logs` with a robust evaluation of this network."""
    network = _checksum(model.state_dict().values())
    runs = run_dirs(logs, ["evaluation"])
    for path in (path for run_dir in runs for path in run_dir.glob("autoattack_*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(path.read_bytes())["settings"]["network"] == network:
                return path.parent
    return None


def _checksum(tensors) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous().view(-1)
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_progress(path: Path, settings: dict) -> Progress | None:
    """The progress that `path` holds, None if there is no such file.

    Raises:
        UserError: the file is unreadable, or its settings differ.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        old, progress = content["settings"], Progress(**content["progress"])
    except (OSError, ValueError, KeyError, TypeError):
        message = f"{path.name} is not a robustness evaluation: delete or rename it"
        raise UserError(message) from None
    differing = [name for name in settings if old.get(name) != settings[name]]
    if differing:
        raise UserError(
            f"{path.name} is of an evaluation with other {', '.join(differing)}: "
            "delete or rename it to start again"
        )
    return progress


@contextlib.contextmanager
def attack_errors() -> Iterator[None]:
    """Turn an attack's ValueError, such as for epsilon 0, into one line.

    Raises:
        UserError: instead of the ValueError.
    """
    try:
        yield
    except ValueError as e:
        raise UserError(str(e)) from None
