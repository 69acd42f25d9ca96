"""Small networks and images for the tests of Part IV, and its commands on a drawn data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from deepvision import checkpoint
from reverse_attack import attack_sets, resnets
from reverse_attack.classifier import Classifier
from reverse_attack.contrastive import ContrastiveLoss, Head
from reverse_attack.protocol import Budget
from utils import save_image

CLASSES, TRAIN, TEST = 4, 40, 16  # of the drawn data set; images per class
EPSILONS = {"l_1": 12.0, "l_2": 0.5, "l_inf": 8.0}
TINY = Budget(8, 4, (2, 2), (2, 2), 2, 2, 4, 2, 2, 3, 2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def images(n: int = 4) -> torch.Tensor:
    """Images in [0, 1] with black and white pixels."""
    return (1.4 * random(n, 3, 16, 16, seed=7) - 0.2).clamp(0, 1)


def make_loss(n_views: int = 2, bank: bool = True, seed: int = 0) -> ContrastiveLoss:
    """The contrastive loss of an untrained network with 5 classes."""
    torch.manual_seed(seed)
    model = Classifier(resnets.build("wrn-10-1", 5)).eval()
    features = torch.rand(12, 64) if bank else None
    return ContrastiveLoss(model, Head(64), n_views=n_views, bank=features).eval()


def snapshot(*modules: torch.nn.Module) -> list:
    """Parameters and buffers, modes, and gradients of modules."""
    state = [v.clone() for m in modules for v in (*m.parameters(), *m.buffers())]
    modes = [m.training for module in modules for m in module.modules()]
    gradients = [(p.requires_grad, p.grad) for module in modules for p in module.parameters()]
    return [state, modes, gradients]


def assert_unchanged(before: list, after: list) -> None:
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]


def draw_images(root: Path) -> None:
    """Class folders of stripes that differ in direction and frequency."""
    rng = np.random.default_rng(0)
    across, down = np.meshgrid(np.arange(32), np.arange(32))
    for split, count in (("train", TRAIN), ("test", TEST)):
        for label in range(CLASSES):
            folder = root / "cifar10" / split / f"kind{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                along = down if label % 2 else across
                stripes = np.sin((along + rng.integers(8)) * (0.8 if label < 2 else 1.6))
                image = (
                    128 + 40 * stripes[..., None] * [1, 0.5, 0.2] + rng.normal(0, 20, (32, 32, 3))
                )
                save_image(folder / f"{i}.png", image.clip(0, 255).astype(np.uint8))


def run(root: Path, command, line: str, limit: int = 64, logs: Path | None = None) -> int:
    """Run a command on the data set in `root`; its run folders are in root/logs."""
    argv = [*line.split(), "--data-root", str(root), "--limit", str(limit)]
    return command.main(argv, logs or root / "logs")


def weights(root: Path, task: str = "clean") -> Path:
    """The best checkpoint of the run of a task."""
    return next((root / "logs").glob(f"cifar10_{task}_*/models/{checkpoint.BEST}"))


def set_of(root: Path, norm: str, steps: int = 5) -> tuple[str, dict]:
    """Name and record of the only attack set of a norm (l_inf, ...) with this number of steps."""
    folder = root / "pgd" / norm
    found = [s for s in attack_sets.read_records(folder) if s[1]["iterations"] == steps]
    (only,) = found
    return only


def x_of(root: Path, norm: str, steps: int = 5) -> np.ndarray:
    """The images of that set."""
    return np.load(root / "pgd" / norm / f"test_perturbed_X_{set_of(root, norm, steps)[0]}.npy")


def evaluations(run_dir: Path) -> list[dict]:
    """The rows of evaluations.jsonl."""
    path = run_dir / "evaluations.jsonl"
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def refused(capsys, status: int) -> str:
    """The one line of a refused command."""
    assert status == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]
