from __future__ import annotations

import importlib.util
import math
import sys
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import coco, cocoeval

from headkd_ray.engine import coco_metrics as module
from headkd_ray.engine.coco_metrics import coco_metrics

LIBRARIES = {"faster-coco-eval": (COCO, COCOeval_faster), "pycocotools": (coco.COCO, cocoeval.COCOeval)}
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}, {"id": 3, "name": "emu"}]


def use(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("COCO", "COCOeval"), LIBRARIES[library], strict=True):
        monkeypatch.setattr(module, name, value)


@pytest.fixture(params=LIBRARIES, autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let every rule hold with both libraries."""
    use(request.param, monkeypatch)
    return request.param


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
    """An IoU of 0.8 is a match at 0.50, 0.55, ..., 0.80: 7 of 10 thresholds."""
    metrics = coco_metrics(truth([(1, 7, [0, 0, 100, 100])]), [found(1, 7, [0, 0, 100, 80.0001], 0.9)], [1])
    assert metrics.AP == pytest.approx(70) and metrics.AP50 == pytest.approx(100) and metrics.AP75 == pytest.approx(100)


def test_no_detections_is_zero_not_an_error() -> None:
    metrics = coco_metrics(truth([(1, 7, [0, 0, 100, 100])]), [], [1])
    assert metrics.AP == 0 and metrics.per_class["cat"] == 0


def test_images_that_were_not_evaluated_do_not_count() -> None:
    gt = truth([(1, 7, [0, 0, 50, 50]), (2, 7, [0, 0, 50, 50])])
    assert coco_metrics(gt, [found(1, 7, [0, 0, 50, 50], 0.9)], [1]).AP == pytest.approx(100)


def test_any_integer_is_an_annotation_id() -> None:
    """Both libraries treat a match with annotation 0, the first of every Roboflow export, as no match."""
    box = [9, 9, 30, 30]
    gt = {
        "images": [{"id": 1, "file_name": "a", "width": 99, "height": 99}],
        "categories": [{"id": 1, "name": "c"}],
        "annotations": [{"id": 0, "image_id": 1, "category_id": 1, "bbox": box, "area": 900, "iscrowd": 0}],
    }
    detections = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9}]
    assert coco_metrics(gt, detections, [1]).AP == pytest.approx(100)
    assert gt["annotations"][0] == {"id": 0, "image_id": 1, "category_id": 1, "bbox": box, "area": 900, "iscrowd": 0}


@pytest.mark.parametrize("extreme", [0, -1, -(2**63), 2**53 + 1, 2**63 - 1])
def test_ids_of_images_and_classes_do_not_matter(extreme: int) -> None:
    gt = truth([(1, 7, [10, 10, 20, 20]), (1, 90, [30, 30, 60, 60]), (2, 7, [9, 9, 20, 20])])
    detections = [found(1, 7, [10, 10, 20, 17], 0.9), found(1, 90, [30, 30, 60, 60], 0.8), found(2, 7, [5, 9, 20, 20], 0.7)]
    expected = coco_metrics(gt, [dict(entry) for entry in detections], [1, 2])

    def renamed(record: dict) -> dict:
        ids = {"image_id": {1: extreme}, "category_id": {7: extreme}}
        return {**record, **{key: new.get(record[key], record[key]) for key, new in ids.items()}}

    other = {
        "images": [{**image, "id": extreme if image["id"] == 1 else 2} for image in gt["images"]],
        "categories": [{**category, "id": extreme if category["id"] == 7 else category["id"]} for category in CATEGORIES],
        "annotations": [{**renamed(annotation), "id": extreme - k} for k, annotation in enumerate(gt["annotations"])],
    }
    assert coco_metrics(other, [renamed(entry) for entry in detections], [extreme, 2]).as_dict() == expected.as_dict()


def test_an_object_of_any_size_counts() -> None:
    gt = truth([(1, 7, [0, 0, 200_000, 100_000])])
    metrics = coco_metrics(gt, [found(1, 7, [0, 0, 200_000, 100_000], 0.9)], [1])
    assert metrics.AP == pytest.approx(100) and metrics.APl == pytest.approx(100)


def test_more_than_100_objects_an_image_need_max_detections() -> None:
    boxes = [[10 * (k % 15), 10 * (k // 15), 8, 8] for k in range(150)]
    gt = truth([(1, 7, box) for box in boxes])
    detections = [found(1, 7, box, 0.9) for box in boxes]
    assert coco_metrics(gt, [dict(entry) for entry in detections], [1]).AP == pytest.approx(67, abs=1)
    assert coco_metrics(gt, [dict(entry) for entry in detections], [1], max_detections=150).AP == pytest.approx(100)
    assert coco_metrics(gt, detections, [1], max_detections=15).AP == pytest.approx(10, abs=2)


IDS = [0, -1, -(2**63), 2**53, 2**53 + 1, 2**63 - 1, 5, 7]
"""Ids of images and classes, some of which are equal as float64."""


def drawn(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw 6 images and 5 classes, the last without objects: crowds, ignored objects, any ids, sizes and equal scores."""
    rng = np.random.default_rng(seed)
    images, classes = rng.permutation(IDS)[:6].tolist(), rng.permutation(IDS)[:5].tolist()
    side = 10 ** rng.uniform(1.5, 5.3)
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image in images:
        for _ in range(rng.integers(0, 9)):
            box = (side * rng.random(4)).round(1).tolist()
            record = {"image_id": image, "category_id": int(rng.choice(classes[:-1])), "bbox": box}
            marks = {"iscrowd": int(rng.random() < 0.2), "ignore": int(rng.random() < 0.2)}
            annotations.append({**record, "id": int(rng.integers(-3, 3)), "area": box[2] * box[3] * rng.random(), **marks})
            for _ in range(rng.integers(0, 5)):
                moved = np.abs(np.array(box) * rng.normal(1, 0.1, 4)).tolist()
                detections.append({**record, "bbox": moved, "score": round(float(rng.random()), 1)})
        for _ in range(rng.integers(0, 15)):
            record = {"image_id": image, "category_id": int(rng.choice(classes)), "bbox": (side * rng.random(4)).tolist()}
            detections.append({**record, "score": round(float(rng.random()), 1)})
    rng.shuffle(detections)  # type: ignore[arg-type]
    categories = [{"id": label, "name": f"class {label}"} for label in classes]
    return {"images": [{"id": image} for image in images], "annotations": annotations, "categories": categories}, detections


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("library", ["faster-coco-eval"], indirect=True)
def test_both_libraries_give_the_same_figures(seed: int, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gt, detections = drawn(seed)
    images = [image["id"] for image in gt["images"]]
    for evaluated, found, limit in ((images, detections, 100), (images[:4], detections, 3), (images, [], 100)):
        use(library, monkeypatch)
        fast = coco_metrics(gt, found, evaluated, limit)
        use("pycocotools", monkeypatch)
        reference = coco_metrics(gt, found, evaluated, limit)
        assert fast.images == reference.images and fast.per_class == pytest.approx(reference.per_class, rel=1e-13, nan_ok=True)
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
            assert getattr(fast, name) == pytest.approx(getattr(reference, name), rel=1e-13, nan_ok=True), name
        if found:
            assert 0 < fast.AP50 < 100 and math.isnan(list(fast.per_class.values())[-1])


def test_classes_scored_piece_by_piece_give_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the memory of a large split does not change a bit of its metrics."""
    gt, detections = drawn(1)
    images = [image["id"] for image in gt["images"]]
    whole = coco_metrics(gt, detections, images)
    monkeypatch.setattr(module, "PIECE", len(detections) // 2)
    assert 1 < len(module._pieces(gt, detections, dict.fromkeys(images, 0))) < 5
    assert coco_metrics(gt, detections, images).as_dict() == whole.as_dict()
    monkeypatch.setattr(module, "PIECE", 1)
    assert coco_metrics(gt, detections, images).as_dict() == whole.as_dict()


def test_neither_argument_is_modified() -> None:
    gt, detections = drawn(0)
    before = repr((gt, detections))
    coco_metrics(gt, detections, [image["id"] for image in gt["images"]])
    assert repr((gt, detections)) == before


def test_without_faster_coco_eval_pycocotools_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    spec = importlib.util.spec_from_file_location("metrics_of_a_machine_without_it", module.__file__)
    assert spec is not None and spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, other)
    spec.loader.exec_module(other)
    assert other.COCOeval is cocoeval.COCOeval
    gt = truth([(1, 7, [0, 0, 100, 100])])
    assert other.coco_metrics(gt, [found(1, 7, [0, 0, 100, 80.0001], 0.9)], [1]).AP == pytest.approx(70)
