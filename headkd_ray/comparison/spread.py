"""Means over seeds, their spread, and differences that are paired seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """A figure over seeds; NaN where it cannot be computed."""

    mean: float
    deviation: float
    """Sample standard deviation; NaN for one seed."""

    def __str__(self) -> str:
        return format(self, "")

    def __format__(self, sign: str) -> str:
        """Return mean ± deviation with a decimal, the deviation of one seed left out; ``sign`` "+" also marks gains."""
        if np.isnan(self.mean):
            return "–"
        mean = f"{self.mean:{sign}.1f}"
        return mean if np.isnan(self.deviation) else f"{mean} ± {self.deviation:.1f}"


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation."""
    if not values:
        return Spread(float("nan"), float("nan"))
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Return ours minus theirs for each seed that both have, in ascending order of seeds."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
