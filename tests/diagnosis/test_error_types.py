"""Each kind of error, and what mending it gives."""

from __future__ import annotations

import math
from typing import Any

import pytest

from headkd_ray.diagnosis.error_types import KINDS, error_types
from headkd_ray.diagnosis.overlaps import matched, overlaps
from headkd_ray.engine.coco_metrics import coco_metrics
from tests.diagnosis.test_curves import record, split

OBJECTS = [record(1, 1, 0, id=1, area=100, iscrowd=0), record(1, 2, 100, id=2, area=100, iscrowd=0)]
RIGHT = [record(1, 1, 0, score=0.9), record(1, 2, 100, score=0.8)]


def found(*results: dict[str, Any], objects: list[dict[str, Any]] = OBJECTS) -> Any:
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    pairs = overlaps({"images": [{"id": 1}], "categories": categories, "annotations": objects}, list(results))
    return error_types(pairs, matched(pairs))


def test_nothing_is_wrong() -> None:
    errors = found(*RIGHT)
    assert errors.ap50 == 1 and not any(errors.count.values()) and not any(errors.gain.values())


@pytest.mark.parametrize(
    ("kind", "wrong", "kept"),
    [
        ("class", record(1, 2, 1, score=0.95), RIGHT[1:]),
        ("location", record(1, 1, 4, score=0.95), RIGHT[1:]),
        ("duplicate", record(1, 1, 1, score=0.85), RIGHT),
        ("both", record(1, 2, 4, score=0.95), RIGHT),
        ("background", record(1, 2, 50, score=0.95), RIGHT),
        ("missed", None, RIGHT[1:]),
    ],
)
def test_one_error_of_each_kind(kind: str, wrong: dict[str, Any] | None, kept: list[dict[str, Any]]) -> None:
    """Mending it makes everything right; of a duplicate after all objects are found AP knows nothing."""
    errors = found(*kept, *([] if wrong is None else [wrong]))
    assert errors.count == {**dict.fromkeys(KINDS, 0), kind: 1}
    assert errors.ap50 + errors.gain[kind] == pytest.approx(1)
    assert errors.gain[kind] > 0 or kind == "duplicate"


def test_errors_are_counted_by_the_size_of_the_object_or_else_of_the_detection() -> None:
    """A large dog is missed, a medium cat is found as a dog and at the wrong place; a small detection has no object."""
    boxes = {"large": [0, 0, 96, 96], "medium": [200, 200, 32, 32], "small": [400, 400, 31, 33]}
    objects = [
        {"id": id_, "image_id": 1, "category_id": category, "bbox": boxes[size], "area": 1, "iscrowd": 0}
        for id_, (category, size) in enumerate({2: "large", 1: "medium"}.items(), start=1)
    ]
    results = [(2, boxes["medium"]), (1, [200, 200, 32, 100]), (1, boxes["small"])]
    errors = found(
        *({"image_id": 1, "category_id": category, "bbox": box, "score": 0.5} for category, box in results), objects=objects
    )
    told = {kind: [size for size, count in sizes.items() if count] for kind, sizes in errors.by_size.items()}
    assert told == {
        "class": ["medium"], "location": ["medium"], "both": [], "duplicate": [], "background": ["small"], "missed": ["large"]
    }  # fmt: skip


def test_a_mended_detection_of_an_object_that_is_found_already_is_one_too_many() -> None:
    """The surer one stays: here the wrong one, so that the object is found at its score, before the false one."""
    errors = found(record(1, 1, 0, score=0.5), record(1, 1, 4, score=0.9), record(1, 1, 60, score=0.7), RIGHT[1])
    assert errors.count["location"] == 1 and errors.count["background"] == 1
    assert errors.ap50 == pytest.approx((1 / 3 + 1) / 2)
    assert errors.gain["location"] == pytest.approx((1 - 1 / 3) / 2)


@pytest.mark.parametrize("seed", range(4))
def test_ap_is_coco_s_and_every_wrong_detection_has_a_kind(seed: int) -> None:
    truth, results = split(seed)
    pairs = overlaps(truth, results)
    errors = error_types(pairs, matched(pairs))
    expected = coco_metrics(truth, results, [image["id"] for image in truth["images"]]).AP50
    assert 100 * errors.ap50 == pytest.approx(expected, abs=1e-9)
    assert all(gain >= -1e-12 for gain in errors.gain.values())
    assert {kind: sum(sizes.values()) for kind, sizes in errors.by_size.items()} == errors.count


def test_without_objects() -> None:
    errors = found(*RIGHT, objects=[])
    assert math.isnan(errors.ap50) and errors.count["background"] == 2
