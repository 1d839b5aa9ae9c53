"""COCO box metrics, computed with pycocotools; a metric that cannot be computed is NaN, never 0."""

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
    """Average precision in percent (0..100), at up to 100 detections per image and class unless another limit was given.

    ``AP`` averages over IoU 0.50:0.95; s, m and l are COCO's areas (under 32², to 96², above, in original pixels).
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
    """Number of images evaluated."""

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics for JSON, which has no NaN: a metric that cannot be computed is None."""
        values = asdict(self)
        values["per_class"] = {name: _known(value) for name, value in self.per_class.items()}
        return {name: _known(value) for name, value in values.items()}


def coco_metrics(
    ground_truth: dict[str, Any], detections: list[dict[str, Any]], image_ids: list[int], max_detections: int = 100
) -> CocoMetrics:
    """Evaluate detections with pycocotools.

    Args:
        ground_truth: COCO dictionary: images, annotations (bbox, area, iscrowd, category_id), categories. Ids may be any
            integers. It is not modified.
        detections: COCO results: image_id, category_id, bbox (xywh, pixels of the stored image), score.
        image_ids: the images that were evaluated; ground truth of other images is ignored.
        max_detections: how many of an image's best detections count in each class.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        # pycocotools records the id of the annotation that a detection matched, and reads an id of 0 as "no match".
        numbered = [{**annotation, "id": number} for number, annotation in enumerate(ground_truth["annotations"], start=1)]
        truth.dataset = {**ground_truth, "annotations": numbered}
        truth.createIndex()
        found = _results(truth, detections)
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.params.maxDets = [max_detections]
        # pycocotools ignores objects of more than 1e10 square pixels even in the area range "all".
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
    """Call ``COCO.loadRes``, but also accept an empty list: no detections are a legitimate, if poor, result."""
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
