"""Whether an exported file detects what the checkpoint detects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headkd_ray.deploy.detections import ImageDetections

BOX = 0.1
"""Largest difference of a box's side, in pixels of the image."""
SCORE = 1e-3
"""Largest difference of a score."""
ONE_IN = 1000
"""One detection in so many, and one more, may have no partner: rounding decides ties in NMS and at the score threshold."""


@dataclass
class Agreement:
    """How far the detections of two networks on the same images agree; a partner has the same class, and box and score within
    the tolerances."""

    detections: int = 0
    """Number of the first network's detections."""
    alone: int = 0
    """Number of detections without a partner, of the network that has more of them."""
    box: float = 0.0
    """Largest difference of the boxes of partners, in pixels."""
    score: float = 0.0
    """Largest difference of the scores of partners."""
    example: str = ""
    """The highest-scored detection without a partner."""
    _example_score: float = -1.0

    @property
    def holds(self) -> bool:
        """Whether the two networks detect the same."""
        return self.alone <= 1 + self.detections // ONE_IN

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {"detections": self.detections, "alone": self.alone, "box": self.box, "score": self.score}

    def add(self, wanted: ImageDetections, found: ImageDetections, image_id: int) -> None:
        """Compare the detections of an image."""
        box, score = _distances(wanted, found)
        partner = np.full(len(wanted), -1)
        for row in range(len(wanted)):
            fits = (box[row] <= BOX) & (score[row] <= SCORE)
            fits[partner[:row][partner[:row] >= 0]] = False
            if fits.any():
                partner[row] = int(np.where(fits, box[row], np.inf).argmin())
                self.box = max(self.box, float(box[row, partner[row]]))
                self.score = max(self.score, float(score[row, partner[row]]))
        missed = partner < 0
        new = np.ones(len(found), dtype=bool)
        new[partner[~missed]] = False
        self.detections += len(wanted)
        self.alone += max(int(missed.sum()), int(new.sum()))
        for detections, alone, who in ((wanted, missed, "the checkpoint"), (found, new, "the file")):
            self._remember(detections, alone, f"only {who} finds, in image {image_id},")

    def _remember(self, detections: ImageDetections, alone: NDArray[np.bool_], what: str) -> None:
        if alone.any():
            first = int(alone.argmax())  # best first
            score = float(detections.scores[first])
            if score > self._example_score:
                corners = ", ".join(f"{side:.1f}" for side in detections.boxes[first])
                self._example_score, self.example = score, f"{what} {detections.names[first]!r} {score:.3f} at [{corners}]"


def _distances(one: ImageDetections, other: ImageDetections) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the differences (N, M) of boxes, infinite for other classes, and of scores."""
    box = np.abs(one.boxes[:, None] - other.boxes[None]).max(axis=-1, initial=0.0)
    box[one.labels[:, None] != other.labels[None]] = np.inf
    return box, np.abs(one.scores[:, None] - other.scores[None])
