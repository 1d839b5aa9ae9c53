"""Early stopping (``eval.patience``)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Patience:
    """Counts the evaluations since the best one; a part of the training state, so that a resumed run ends where it should."""

    evaluations: int | None = None
    """Evaluations in a row without a better AP after which training ends; None = never."""
    best: float = -math.inf
    """The best AP so far, in percent."""
    epoch: int = 0
    """Epoch of the best AP."""
    since: int = 0
    """Evaluations after that one."""

    def see(self, ap: float, epoch: int) -> None:
        """Count an evaluation. An AP that is NaN, because the split has no ground truth to find, is not a better one."""
        if ap > self.best:
            self.best, self.epoch, self.since = ap, epoch, 0
        else:
            self.since += 1

    @property
    def exhausted(self) -> bool:
        """Whether training ends here."""
        return self.evaluations is not None and self.since >= self.evaluations

    def __str__(self) -> str:
        return f"AP has not risen in {self.since} evaluations since epoch {self.epoch} ({self.best:.1f})"

    def state_dict(self) -> dict[str, Any]:
        """Return what has been seen."""
        return {name: value for name, value in asdict(self).items() if name != "evaluations"}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self.best, self.epoch, self.since = saved["best"], saved["epoch"], saved["since"]
