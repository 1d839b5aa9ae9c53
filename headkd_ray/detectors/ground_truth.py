"""The ground truth of a batch, passed as one object from the data to every loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class GroundTruth(NamedTuple):
    """The labelled boxes of B images; G is at least 1, so that no loss reduces over an empty dimension."""

    boxes: Tensor
    """(B, G, 4) float32 x1, y1, x2, y2 in pixels of the network input; rows of zeros are padding."""
    labels: Tensor
    """(B, G) int64, 0 to C-1, -1 = padding."""
    sizes: Tensor
    """(B, 2) int64 (h, w) of each image without its padding, pixels of the network input."""

    @classmethod
    def of(cls, boxes: Tensor, labels: Tensor, sizes: Tensor) -> GroundTruth:
        """Build the ground truth from padded ``boxes`` (B, G, 4), ``labels`` (B, G) and ``sizes`` (B, 2); here G may be 0."""
        if labels.shape[1] == 0:
            boxes, labels = boxes.new_zeros(len(boxes), 1, 4), labels.new_full((len(labels), 1), -1)
        return cls(boxes, labels, sizes)

    @property
    def present(self) -> Tensor:
        """Mask (B, G) bool of the real boxes, False = padding."""
        return self.labels >= 0
