"""AP on resampled images is COCO's AP of a data set in which images are repeated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from headkd_ray.diagnosis.overlaps import overlaps
from headkd_ray.diagnosis.resampling import ResampledAP, interval, resamples
from headkd_ray.engine.coco_metrics import coco_metrics
from tests.diagnosis.test_curves import split


def repeated(
    truth: dict[str, Any], results: list[dict[str, Any]], weights: list[int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the data set with each image as often as ``weights`` says."""
    numbers = [image["id"] for image, count in zip(truth["images"], weights, strict=True) for _ in range(count)]
    annotations, found = (
        [{**each, "image_id": number} for number, image in enumerate(numbers) for each in records if each["image_id"] == image]
        for records in (truth["annotations"], results)
    )
    annotations = [{**each, "id": number} for number, each in enumerate(annotations, start=1)]
    return {**truth, "images": [{"id": number} for number in range(len(numbers))], "annotations": annotations}, found


@pytest.mark.parametrize("seed", range(3))
def test_ap_of_repeated_images(seed: int) -> None:
    truth, results = split(seed)
    rng = np.random.default_rng(seed)
    results = [{**each, "score": float(rng.random())} for each in results]  # of equal scores the order matters
    weights = np.concatenate([np.ones((1, 12), dtype=np.int64), resamples(12, 2, seed)])
    values = ResampledAP(overlaps(truth, results))(weights)
    for row, value in zip(weights.tolist(), values, strict=True):
        again, found = repeated(truth, results, row)
        assert value == pytest.approx(coco_metrics(again, found, list(range(12))).AP, abs=1e-9)


def test_few_resamples_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory does not grow with the number of resamples and detections."""
    measure, weights = ResampledAP(overlaps(*split(0))), resamples(12, 7)
    whole = measure(weights)
    monkeypatch.setattr("headkd_ray.diagnosis.resampling.CELLS", 50)
    assert measure(weights).tolist() == whole.tolist()


def test_classes_without_an_object_in_a_resample_do_not_count() -> None:
    truth, results = split(1)
    none = np.zeros((1, 12), dtype=np.int64)
    assert np.isnan(ResampledAP(overlaps(truth, results))(none)).all()


def test_the_interval_covers_what_images_and_seeds_contribute() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(1.0, 0.5, 4000)
    low, high = interval(np.stack([images, images]))
    assert (low, high) == (pytest.approx(1 - 0.98, abs=0.06), pytest.approx(1 + 0.98, abs=0.06))
    wide = interval(np.stack([images - 2, images + 2]))
    assert wide[0] < low - 1 and wide[1] > high + 1
