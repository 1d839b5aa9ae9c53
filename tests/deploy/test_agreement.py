"""When two sets of detections count as the same."""

from __future__ import annotations

import numpy as np
import pytest

from headkd_ray.deploy.agreement import Agreement
from headkd_ray.deploy.detections import ImageDetections


def detections(count: int, box: float = 0.0, score: float = 0.0, label: int = 0) -> ImageDetections:
    """Return boxes that overlap like ties do, the first one changed."""
    boxes = np.array([[0, 0, 10 + i, 20] for i in range(count)], np.float32)
    scores = np.linspace(0.9, 0.1, count, dtype=np.float32)
    labels = np.zeros(count, np.int64)
    boxes[0, 0] += box
    scores[0] += score
    labels[0] = label
    return ImageDetections(boxes, scores, labels, ("cat", "dog"), (1, 2), (100, 100))


def agreement(images: int, **change: float) -> Agreement:
    found = Agreement()
    for image in range(images):
        found.add(detections(10), detections(10, **change), image)  # type: ignore[arg-type]
    return found


def test_rounding_is_no_difference() -> None:
    found = agreement(5, box=0.09, score=9e-4)
    assert found.holds and found.alone == 0 and found.detections == 50
    assert found.box == pytest.approx(0.09, abs=1e-6) and found.score == pytest.approx(9e-4, abs=1e-6)


@pytest.mark.parametrize("change", [{"box": 0.2}, {"score": 2e-3}, {"label": 1}])
def test_a_box_a_score_or_a_class_may_differ(change: dict[str, float]) -> None:
    """Once among few detections it is a tie, in every image a fault."""
    assert agreement(1, **change).holds
    found = agreement(5, **change)
    assert found.alone == 5 and not found.holds
    assert found.example.startswith("only the ") and "in image 0, '" in found.example


def test_the_order_does_not_count() -> None:
    one, found = detections(10), Agreement()
    turned = ImageDetections(one.boxes[::-1], one.scores[::-1], one.labels[::-1], one.classes, one.category_ids, one.size)
    found.add(one, turned, 7)
    assert found.alone == 0


@pytest.mark.parametrize(("wanted", "found"), [(0, 0), (0, 10), (10, 0)])
def test_images_without_detections(wanted: int, found: int) -> None:
    one = detections(10)
    empty = ImageDetections(one.boxes[:0], one.scores[:0], one.labels[:0], one.classes, one.category_ids, one.size)
    result = Agreement()
    result.add(one if wanted else empty, one if found else empty, 7)
    assert (result.detections, result.alone) == (wanted, max(wanted, found) if wanted != found else 0)
