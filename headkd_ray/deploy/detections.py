"""The detections of one image, for users of the Python API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headkd_ray.deploy.extras import needs_extra


@dataclass(frozen=True)
class ImageDetections:
    """The N detections of one image, best first."""

    boxes: NDArray[np.float32]
    """(N, 4): x1 y1 x2 y2, in pixels of the image that was given, inside it."""
    scores: NDArray[np.float32]
    """(N,), in 0..1."""
    labels: NDArray[np.int64]
    """(N,): index of the class in ``classes``."""
    classes: tuple[str, ...]
    """Names of all classes that the detector knows."""
    category_ids: tuple[int, ...]
    """COCO category id of each of ``classes``."""
    size: tuple[int, int]
    """Height and width of the image in pixels."""

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.classes[label] for label in self.labels]

    def above(self, score: float) -> ImageDetections:
        """Return the detections of at least ``score``."""
        kept = self.scores >= score
        return ImageDetections(
            self.boxes[kept], self.scores[kept], self.labels[kept], self.classes, self.category_ids, self.size
        )

    def to_coco(self, image_id: int = 0, category_ids: Sequence[int | None] | None = None) -> list[dict[str, Any]]:
        """Return COCO results: image_id, category_id, bbox (x, y, width, height in pixels) and score.

        Args:
            category_ids: id of each class in place of the detector's own; None = leave out its detections.
        """
        ids: Sequence[int | None] = self.category_ids if category_ids is None else category_ids
        xywh = np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1).tolist()
        return [
            {"image_id": image_id, "category_id": ids[label], "bbox": box, "score": score}
            for box, score, label in zip(xywh, self.scores.tolist(), self.labels.tolist(), strict=True)
            if ids[label] is not None
        ]

    def to_supervision(self) -> Any:
        """Return ``supervision.Detections``, with the class names in ``data["class_name"]``.

        Raises:
            ExportError: the package supervision is not installed.
        """
        with needs_extra("supervision", "to_supervision()"):
            import supervision
        data: dict[str, Any] = {"class_name": np.array(self.names, dtype=str)}
        return supervision.Detections(xyxy=self.boxes, confidence=self.scores, class_id=self.labels, data=data)
