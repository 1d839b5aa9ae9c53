"""COCO box metrics with pycocotools; a metric that cannot be computed is NaN, never 0."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


@dataclass(frozen=True)
class CocoMetrics:
    """Average precision in percent (0..100), at up to 100 detections an image and class unless more or fewer were asked for.

    ``AP`` averages IoU 0.50:0.95; s, m, l are COCO's areas (under 32², to 96², above, in original pixels).
    """

    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    per_class: dict[str, float]
    """AP by class name, in the data set's class order."""
    images: int
    """Images evaluated."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON stores it: None where a metric cannot be computed, for JSON has no NaN."""
        values = asdict(self)
        values["per_class"] = {name: _known(value) for name, value in self.per_class.items()}
        return {name: _known(value) for name, value in values.items()}


def coco_metrics(
    ground_truth: dict[str, Any], detections: list[dict[str, Any]], image_ids: list[int], max_detections: int = 100
) -> CocoMetrics:
    """Evaluate detections as pycocotools does.

    Args:
        ground_truth: COCO dictionary: images, annotations (bbox, area, iscrowd, category_id), categories. Ids may be any
            integers. It is not changed.
        detections: COCO results: image_id, category_id, bbox (xywh, pixels of the stored image), score.
        image_ids: the images that were evaluated; ground truth of others is left out.
        max_detections: how many of an image's best detections count, in each class.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        # pycocotools marks what a detection matched by the annotation's id, and takes an id of 0 for "nothing".
        numbered = [{**annotation, "id": number} for number, annotation in enumerate(ground_truth["annotations"], start=1)]
        truth.dataset = {**ground_truth, "annotations": numbered}
        truth.createIndex()
        found = _results(truth, detections)
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.params.maxDets = [max_detections]
        # pycocotools leaves out objects of more than 1e10 square pixels even where it says "all".
        evaluation.params.areaRng = [[low, math.inf if high == 1e10 else high] for low, high in evaluation.params.areaRng]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]  # IoU threshold 0.50, 0.55 …, recall, class, area
    small, medium, large = (_mean(precision[:, :, :, area]) for area in (1, 2, 3))
    overall = precision[:, :, :, 0]
    by_id = {category: _mean(overall[:, :, k]) for k, category in enumerate(evaluation.params.catIds)}
    return CocoMetrics(
        AP=_mean(overall),
        AP50=_mean(overall[0]),
        AP75=_mean(overall[5]),
        APs=small,
        APm=medium,
        APl=large,
        per_class={category["name"]: by_id[category["id"]] for category in ground_truth["categories"]},
        images=len(image_ids),
    )


def _results(truth: COCO, detections: list[dict[str, Any]]) -> COCO:
    """``COCO.loadRes`` that also accepts an empty list: no detection is a legitimate, if poor, result."""
    if detections:
        return truth.loadRes(detections)
    empty = COCO()
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _mean(precision: np.ndarray) -> float:
    counted = precision[precision > -1]  # -1 marks classes without ground truth
    return 100 * float(counted.mean()) if counted.size else float("nan")
