"""The ground truth of a batch, passed as one object from the data to every loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GroundTruth(NamedTuple):
    """The labelled boxes of B images; G is at least 1, so that no loss reduces over an empty dimension."""

    boxes: Tensor
    """(B, G, 4) float32 x1, y1, x2, y2 in pixels of the network input; rows of zeros are padding."""
    labels: Tensor
    """(B, G) int64, 0 to C-1, -1 = padding."""
    sizes: Tensor
    """(B, 2) int64 (h, w) of each image without its padding, pixels of the network input."""
    weights: Tensor
    """(B, G) float32: the loss weight of each box, 1 for ground truth and the score of a pseudo label; 0 = the box is ignored:
    what matches it is neither an object nor background."""
    background: Tensor
    """(B,) bool: whether what no box covers is background; False = nothing is known about it, so that it gives no loss."""

    @classmethod
    def of(
        cls,
        boxes: Tensor,
        labels: Tensor,
        sizes: Tensor,
        weights: Tensor | None = None,
        background: Tensor | None = None,
    ) -> GroundTruth:
        """Build the ground truth from padded ``boxes`` (B, G, 4), ``labels`` (B, G) and ``sizes`` (B, 2); here G may be 0.

        Without ``weights`` (B, G) all boxes count fully, and without ``background`` (B,) the rest of every image is background.
        """
        if labels.shape[1] == 0:
            boxes, labels, weights = boxes.new_zeros(len(boxes), 1, 4), labels.new_full((len(labels), 1), -1), None
        if weights is None:
            weights = boxes.new_ones(labels.shape)
        if background is None:
            background = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        return cls(boxes, labels, sizes, weights, background)

    @property
    def present(self) -> Tensor:
        """Mask (B, G) bool of the real boxes, False = padding."""
        return self.labels >= 0

    @property
    def counted(self) -> Tensor:
        """Mask (B, G) bool of the boxes from which there is something to learn: neither padding nor ignored."""
        return self.present & (self.weights > 0)

    @property
    def informative(self) -> Tensor:
        """Mask (B,) bool of the images that give a loss: their background is known, or they have a box that counts."""
        return self.background | self.counted.any(1)
