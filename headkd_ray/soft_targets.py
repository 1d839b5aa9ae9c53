"""Soft targets: what a teacher says about the RoIs of a view, whoever computed it and wherever it was kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SoftTargets(NamedTuple):
    """Of a batch; K is the RoI budget, L the number of the teacher's fully connected layers, D their width."""

    boxes: Tensor
    """(B, K, 4) float32 RoIs, pixels of the network input; zeros as padding."""
    truth: Tensor
    """(B, K) bool: RoIs that are ground-truth boxes."""
    valid: Tensor
    """(B, K) bool, False = padding."""
    taps: Tensor
    """(B, L, K, D) float32: the teacher's post-ReLU outputs, layer by layer; zeros as padding."""

    def map(self, change: Callable[[Tensor], Tensor]) -> SoftTargets:
        """``change`` done to every tensor."""
        return SoftTargets(*(change(tensor) for tensor in self))

    @classmethod
    def empty(cls, batch: int, budget: int, layers: int, width: int) -> SoftTargets:
        """Nothing but padding, on the CPU."""
        return cls(
            boxes=torch.zeros(batch, budget, 4),
            truth=torch.zeros(batch, budget, dtype=torch.bool),
            valid=torch.zeros(batch, budget, dtype=torch.bool),
            taps=torch.zeros(batch, layers, budget, width),
        )


class TopLogits(NamedTuple):
    """What the teacher takes each of k RoIs for: its M greatest class logits, the greatest first; M may be 0."""

    logits: NDArray[np.float32]
    """(k, M)."""
    classes: NDArray[np.int64]
    """(k, M): contiguous classes of the data, 0..C-1; C = background."""


class ViewTargets(NamedTuple):
    """The same of one view, without padding; k RoIs, at most the budget."""

    boxes: NDArray[np.float32]
    """(k, 4), pixels of the view."""
    truth: NDArray[np.bool_]
    """(k,)."""
    taps: NDArray[np.float32]
    """(L, k, D)."""
    top: TopLogits
    """Of the k RoIs."""


class PackedTargets(NamedTuple):
    """The same as a cache keeps it; its fields are those of ``headkd_ray.teacher.target_cache.SCHEMA``."""

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
    """The targets of a batch's ``views`` (at least one), padded to ``budget`` RoIs each."""
    layers, _, width = views[0].taps.shape
    targets = SoftTargets.empty(len(views), budget, layers, width)
    for i, view in enumerate(views):
        count = len(view.boxes)
        targets.boxes[i, :count] = torch.from_numpy(view.boxes)
        targets.truth[i, :count] = torch.from_numpy(view.truth)
        targets.valid[i, :count] = True
        targets.taps[i, :, :count] = torch.from_numpy(view.taps)
    return targets
