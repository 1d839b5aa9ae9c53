"""Distances between a feature of the student's, adapted, and the feature that it imitates."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headkd_ray.detectors.head_features import Tap
from headkd_ray.detectors.ops.losses import mean_squared_error

Distance = Callable[[Tensor, Tensor], Tensor]
"""From features and their target, both (R, C) or (B, C, H, W), to a float32 scalar; the target gets no gradient."""

EPSILON = 1e-6
"""Added to variances, so that a feature without variance (all channels behind a ReLU may be 0) becomes 0, not NaN."""


def pearson(own: Tensor, target: Tensor) -> Tensor:
    """Return the MSE of features whose channels are standardised at every RoI or place: on average, 2 (1 - r), in [0, 4].

    r is Pearson's correlation of the two features over channels. Scale and offset of a feature are lost, and with them the
    difference between teachers, layers and widths: one weight suits all. PKD standardises each channel over the batch instead;
    here the result for a RoI depends on that RoI alone, so that batch size, number of workers and number of RoIs do not matter.
    """
    return mean_squared_error(standardised(own), standardised(target.detach()))


def standardised(features: Tensor) -> Tensor:
    """Return ``features`` (R, C) or (B, C, H, W) as float32 of mean 0 and variance 1 over channels, channels last."""
    rows = features.float().movedim(1, -1)
    return F.layer_norm(rows, rows.shape[-1:], eps=EPSILON)


DISTANCES: dict[str, Distance] = {"mse": mean_squared_error, "pearson": pearson}
"""The distances by their names in a job's ``distill.distance``."""


def distance_of_counted(distance: Distance, own: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """Return the ``distance``, which must be a mean over rows, of those rows of ``own`` and ``target`` (R, C) that count.

    ``counted`` (R,) says which; None = all. The distance of no rows is 0.
    """
    if counted is None:
        return distance(own, target)
    # A row that equals its target adds nothing to the mean, and gets no gradient.
    rows = torch.where(counted.unsqueeze(1), own, target.detach())
    return distance(rows, target) * (len(rows) / counted.sum().clamp(min=1))


def adapted_distance(distance: Distance, adapt: nn.Module, own: Tap, theirs: Tap, counted: Tensor | None = None) -> Tensor:
    """Return the ``distance`` of ``own``, adapted, from ``theirs``, which gets no gradient.

    They are rows (R, C) and (R, C'), or maps (B, C, H, W) and (B, C', H, W) whose distances are summed over levels. Rows of
    ground-truth boxes count like any other; with ``counted`` (R,), only rows that are True do.
    """
    if isinstance(own, Tensor) and isinstance(theirs, Tensor):
        return distance_of_counted(distance, adapt(own), theirs, counted)
    return torch.stack([distance(adapt(o), t) for o, t in zip(own, theirs, strict=True)]).sum()
