import math

import pytest

from headkd_ray.engine.coco import coco_metrics

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}, {"id": 3, "name": "emu"}]


def truth(boxes: list[tuple[int, int, list[float]]]) -> dict:
    annotations = [
        {"id": i + 1, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, (image, category, box) in enumerate(boxes)
    ]
    images = [{"id": i, "height": 200, "width": 200} for i in sorted({image for image, _, _ in boxes})]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def found(image: int, category: int, box: list[float], score: float) -> dict:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def test_perfect_detections_score_100_and_absent_classes_nan() -> None:
    gt = truth([(1, 7, [10, 10, 20, 20]), (2, 90, [30, 30, 150, 150])])
    metrics = coco_metrics(gt, [found(1, 7, [10, 10, 20, 20], 0.9), found(2, 90, [30, 30, 150, 150], 0.8)], [1, 2])
    assert metrics.AP == pytest.approx(100) and metrics.APs == pytest.approx(100) and metrics.APl == pytest.approx(100)
    assert math.isnan(metrics.APm) and math.isnan(metrics.per_class["emu"])
    assert list(metrics.per_class) == ["cat", "dog", "emu"] and metrics.images == 2


def test_iou_thresholds_by_hand() -> None:
    """IoU 0.8 is a match at 0.50, 0.55, ..., 0.80: 7 of 10 thresholds."""
    metrics = coco_metrics(truth([(1, 7, [0, 0, 100, 100])]), [found(1, 7, [0, 0, 100, 80.0001], 0.9)], [1])
    assert metrics.AP == pytest.approx(70) and metrics.AP50 == pytest.approx(100) and metrics.AP75 == pytest.approx(100)


def test_no_detections_is_zero_not_an_error() -> None:
    metrics = coco_metrics(truth([(1, 7, [0, 0, 100, 100])]), [], [1])
    assert metrics.AP == 0 and metrics.per_class["cat"] == 0


def test_images_that_were_not_evaluated_do_not_count() -> None:
    gt = truth([(1, 7, [0, 0, 50, 50]), (2, 7, [0, 0, 50, 50])])
    assert coco_metrics(gt, [found(1, 7, [0, 0, 50, 50], 0.9)], [1]).AP == pytest.approx(100)
