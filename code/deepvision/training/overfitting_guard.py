"""Catastrophic overfitting of adversarial training: detect it, restore the last good weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor, nn

from deepvision.checkpoint import first_nonfinite, state_dict_mismatch


@dataclass
class CatastrophicOverfittingGuard:
    """Keeps the weights of the last epoch that was robust.

    Trained against weak attacks, a network may lose all robustness against strong ones within an
    epoch (Wong et al., 2020, section 5.4).

    chance: the accuracy of guessing, in per cent
    best: the highest robust accuracy so far, in per cent
    epoch, weights: the last epoch that kept half of it, and the network after it
    """

    chance: float
    best: float = 0.0
    epoch: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def check_and_restore(self, model: nn.Module, robust: float, epoch: int) -> bool:
        """Return True if `robust` (per cent) is a collapse; `model` then has the last good weights.

        A drop counts only if the best accuracy was above 1.5 times chance.
        """
        if self.best > 1.5 * self.chance and robust < self.best / 2:
            model.load_state_dict(self.weights)
            return True
        self.best, self.epoch = max(self.best, robust), epoch
        self.weights = {name: v.detach().clone() for name, v in model.state_dict().items()}
        return False

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"best": self.best, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: dict, model: nn.Module) -> None:
        """Continue from `state`.

        Raises:
            ValueError, TypeError, LookupError: it is invalid, or its weights do not fit `model`.
        """
        best, epoch, weights = float(state["best"]), int(state["epoch"]), dict(state["weights"])
        if not math.isfinite(best):
            raise ValueError
        if (best > 0 or weights) and (
            state_dict_mismatch(model, weights) or first_nonfinite({"state_dict": weights})
        ):
            raise ValueError
        self.best, self.epoch, self.weights = best, epoch, weights
