"""Curves agree with COCO's evaluation, and with counting by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from headkd_ray.diagnosis.confusion import confusion
from headkd_ray.diagnosis.curves import curves
from headkd_ray.diagnosis.overlaps import matched, overlaps
from headkd_ray.engine.coco_metrics import coco_metrics


def split(seed: int, images: int = 12, classes: int = 3) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return ground truth with crowds, and detections, some near objects and some not, with repeated scores."""
    rng = np.random.default_rng(seed)

    def box() -> list[float]:
        return [*rng.uniform(0, 60, 2).tolist(), *rng.uniform(8, 40, 2).tolist()]

    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(images):
        for _ in range(int(rng.integers(0, 7))):
            label, bbox = int(rng.integers(classes)), box()
            crowd = int(rng.random() < 0.15)
            record = {"image_id": 7 * image, "category_id": 10 - label, "bbox": bbox}
            annotations.append({**record, "id": len(annotations), "area": bbox[2] * bbox[3], "iscrowd": crowd})
            for _ in range(int(rng.integers(0, 4))):
                moved = (np.array(bbox) + rng.normal(0, 3, 4)).clip(1).tolist()
                guess = 10 - int(rng.integers(classes)) if rng.random() < 0.3 else record["category_id"]
                results.append({**record, "category_id": guess, "bbox": moved, "score": round(float(rng.random()), 1)})
        for _ in range(int(rng.integers(0, 3))):
            results.append({"image_id": 7 * image, "category_id": 10, "bbox": box(), "score": round(float(rng.random()), 1)})
    truth = {
        "images": [{"id": 7 * image} for image in range(images)],
        "categories": [{"id": 10 - label, "name": f"class {label}"} for label in range(classes)],
        "annotations": annotations,
    }
    return truth, results


@pytest.mark.parametrize("most", [100, 2])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_coco_s(seed: int, most: int) -> None:
    truth, results = split(seed)
    found = curves(overlaps(truth, results, most))
    expected = coco_metrics(truth, results, [image["id"] for image in truth["images"]], most)
    assert 100 * np.mean([each.ap50 for each in found]) == pytest.approx(expected.AP50, abs=1e-9)
    strict_pairs = overlaps(truth, results, most)
    stricter = curves(strict_pairs, matched(strict_pairs, 0.75))
    assert 100 * np.mean([each.ap50 for each in stricter]) == pytest.approx(expected.AP75, abs=1e-9)


def record(image: int, category: int, x: float, **more: Any) -> dict[str, Any]:
    """Return a box of 10 x 10 pixels at (x, 0)."""
    return {"image_id": image, "category_id": category, "bbox": [x, 0.0, 10.0, 10.0], **more}


TRUTH = {
    "images": [{"id": 1}, {"id": 2}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "fox"}],
    "annotations": [
        record(1, 1, 0, id=1, area=100, iscrowd=0),
        record(1, 1, 20, id=2, area=100, iscrowd=0),
        record(1, 2, 40, id=3, area=100, iscrowd=0),
        {**record(2, 2, 0, id=4, iscrowd=1), "area": 5000, "bbox": [0.0, 0.0, 100.0, 50.0]},
    ],
}
RESULTS = [
    record(1, 1, 1, score=0.9),  # the first cat
    record(1, 1, 0, score=0.8),  # again
    record(1, 1, 20, score=0.6),  # the second
    record(1, 1, 40, score=0.3),  # the dog
    record(2, 2, 5, score=0.7),  # in the crowd
    record(2, 2, 200, score=0.2),  # nothing
    record(9, 1, 0, score=1.0),  # of no image
]


def test_thresholds_by_hand() -> None:
    cat, dog, fox = curves(overlaps(TRUTH, RESULTS))
    assert (cat.objects, cat.score.tolist()) == (2, [0.9, 0.8, 0.6, 0.3])
    assert cat.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2]) and cat.recall.tolist() == [0.5, 0.5, 1, 1]
    assert cat.threshold == 0.6 and cat.f1.max() == pytest.approx(0.8)
    assert dog.objects == 1 and dog.score.tolist() == [0.2] and dog.threshold is None, "the one in the crowd does not count"
    assert fox.objects == 0 and fox.threshold is None and math.isnan(fox.ap50)


@pytest.mark.parametrize("seed", range(4))
def test_no_threshold_has_a_higher_f1_with_all_detections_that_it_keeps(seed: int) -> None:
    """Scores of half precision are often equal, and a threshold keeps all or none of them."""
    pairs = overlaps(*split(seed))
    matches, ignored = matched(pairs)
    for label, each in enumerate(curves(pairs)):
        mine = (pairs.found.label == label) & ~ignored
        f1 = {
            float(score): 2 * (matches[kept] >= 0).sum() / (each.objects + kept.sum())
            for score in np.unique(pairs.score[mine])
            for kept in [mine & (pairs.score >= score)]
        }
        assert each.threshold in f1 and f1[each.threshold] == pytest.approx(max(f1.values()))
        assert each.best is not None and each.f1[each.best] == pytest.approx(max(f1.values()))


def test_confusion_by_hand() -> None:
    pairs = overlaps(TRUTH, RESULTS)
    assert matched(pairs)[1].sum() == 1
    assert confusion(pairs, [0.25, 0.1, None]).tolist() == [
        [2, 0, 0, 0],  # both cats
        [1, 0, 0, 0],  # the dog is taken for a cat
        [0, 0, 0, 0],
        [1, 1, 0, 0],  # a cat twice, and a dog where there is nothing
    ]
    assert confusion(pairs, [0.85, 0.5, 0.5]).tolist() == [[1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_split_without_objects_or_detections() -> None:
    empty = {**TRUTH, "annotations": []}
    assert [each.threshold for each in curves(overlaps(empty, RESULTS))] == [None] * 3
    none = overlaps(TRUTH, [])
    assert [each.ap50 for each in curves(none)][:2] == [0, 0]
    assert confusion(none, [0.5] * 3)[:, -1].tolist() == [2, 1, 0, 0]
    assert not confusion(overlaps(empty, []), [0.5] * 3).any()
