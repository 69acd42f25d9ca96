"""Progress of a run: what a checkpoint stores in addition to weights and optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Epochs done, the best accuracies, and the state within the current epoch.

    data_order: what the order of the batches follows from, by name.
    """

    epoch: int = 0
    batch_in_epoch: int = 0
    best_acc1: float = float("-inf")
    best_robust: float = float("-inf")
    metric_sums: list[float] = field(default_factory=list)  # EpochMetrics.state_dict()
    seconds: float = 0.0  # spent on the current epoch
    iterations: int | None = None  # training steps of all sessions; None in older checkpoints
    data_order: dict = field(default_factory=dict)

    def finish_epoch(self) -> None:
        """Count the current epoch as done and start the next."""
        self.epoch += 1
        self.batch_in_epoch, self.metric_sums, self.seconds = 0, [], 0.0

    def state_dict(self) -> dict:
        """The keys of a checkpoint; `progress` holds the state within the epoch."""
        return {
            "epoch": self.epoch,
            "best_acc1": self.best_acc1,
            "best_robust": self.best_robust,
            "progress": {
                "position": self.batch_in_epoch,
                "tally": self.metric_sums,
                "seconds": self.seconds,
                "iterations": self.iterations,
                "order": self.data_order,
            },
        }

    def load_state_dict(self, ckpt: dict) -> str | None:
        """Continue from a checkpoint. An epoch in progress starts over if its order has changed.

        Returns what could not be restored, else None.

        Raises:
            ValueError, TypeError, LookupError, AttributeError, OverflowError: a value is invalid.
        """
        epoch = int(ckpt.get("epoch", 0))
        best = float(ckpt.get("best_acc1", float("-inf")))
        robust = float(ckpt.get("best_robust", float("-inf")))
        within = ckpt.get("progress") or {"position": 0, "tally": [], "order": {}}
        batch, sums = int(within["position"]), [float(v) for v in within["tally"]]
        seconds, order = float(within.get("seconds", 0)), within["order"]
        iterations = within.get("iterations")
        iterations = None if iterations is None else int(iterations)
        changed = [name for name, v in self.data_order.items() if order.get(name) != v]
        if (
            min(epoch, batch, iterations or 0) < 0
            or len(sums) not in (0, 5)
            or math.isnan(best + robust)
        ):
            raise ValueError
        if not 0 <= seconds < math.inf:
            raise ValueError
        self.epoch, self.best_acc1, self.best_robust = epoch, best, robust
        self.iterations = iterations
        if batch and changed:
            return (
                f"the file was saved in mid-epoch with other {' and '.join(changed)}: "
                f"epoch {epoch + 1} starts over"
            )
        self.batch_in_epoch, self.metric_sums, self.seconds = batch, sums, seconds
        return None
