"""Define soft targets: the outputs of a teacher on the RoIs of a view, wherever they were computed or stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SoftTargets(NamedTuple):
    """The soft targets of a batch; K is the RoI budget, L the number of the teacher's layers, D their width."""

    boxes: Tensor
    """RoIs: float32 (B, K, 4), x1 y1 x2 y2 in pixels of the network input; zeros as padding."""
    truth: Tensor
    """Which RoIs are ground-truth boxes: bool (B, K)."""
    valid: Tensor
    """Which RoIs are not padding: bool (B, K)."""
    taps: Tensor
    """The teacher's features, layer by layer: float32 (B, L, K, D); zeros as padding."""

    def map(self, change: Callable[[Tensor], Tensor]) -> SoftTargets:
        """Return the targets with ``change`` applied to every tensor."""
        return SoftTargets(*(change(tensor) for tensor in self))

    @classmethod
    def empty(cls, batch: int, budget: int, layers: int, width: int, device: torch.device | str = "cpu") -> SoftTargets:
        """Return targets that are all padding, on ``device``."""
        return cls(
            boxes=torch.zeros(batch, budget, 4, device=device),
            truth=torch.zeros(batch, budget, dtype=torch.bool, device=device),
            valid=torch.zeros(batch, budget, dtype=torch.bool, device=device),
            taps=torch.zeros(batch, layers, budget, width, device=device),
        )


class TopLogits(NamedTuple):
    """The teacher's M largest class logits for each of k RoIs, the largest first; M may be 0."""

    logits: NDArray[np.float32]
    """float32 (k, M)."""
    classes: NDArray[np.int64]
    """The classes of the logits, int64 (k, M): contiguous classes of the data, 0..C-1; C = background."""


class ViewTargets(NamedTuple):
    """The soft targets of one view, without padding; k is the number of its RoIs, at most the budget."""

    boxes: NDArray[np.float32]
    """RoIs: float32 (k, 4), x1 y1 x2 y2 in pixels of the view."""
    truth: NDArray[np.bool_]
    """Which RoIs are ground-truth boxes: bool (k,)."""
    taps: NDArray[np.float32]
    """The teacher's features, layer by layer: float32 (L, k, D)."""
    top: TopLogits
    """The teacher's largest class logits."""


class PackedTargets(NamedTuple):
    """The soft targets of one view as a cache stores them, with the fields of ``headkd_ray.teacher.target_cache.SCHEMA``."""

    image_id: int
    view: int
    rois: int
    boxes: bytes
    truth: bytes
    taps: bytes
    logits: bytes
    classes: bytes
    scales: bytes


def stack(views: Sequence[ViewTargets], budget: int) -> SoftTargets:
    """Combine the targets of a batch's ``views`` (at least one), padded to ``budget`` RoIs each."""
    layers, _, width = views[0].taps.shape
    targets = SoftTargets.empty(len(views), budget, layers, width)
    for i, view in enumerate(views):
        count = len(view.boxes)
        targets.boxes[i, :count] = torch.from_numpy(view.boxes)
        targets.truth[i, :count] = torch.from_numpy(view.truth)
        targets.valid[i, :count] = True
        targets.taps[i, :, :count] = torch.from_numpy(view.taps)
    return targets
