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
    """Average precision in percent (0..100) at up to 100 detections an image.

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


def coco_metrics(ground_truth: dict[str, Any], detections: list[dict[str, Any]], image_ids: list[int]) -> CocoMetrics:
    """Evaluate detections as pycocotools does.

    Args:
        ground_truth: COCO dictionary: images, annotations (bbox, area, iscrowd, category_id), categories.
        detections: COCO results: image_id, category_id, bbox (xywh, pixels of the stored image), score.
        image_ids: the images that were evaluated; ground truth of others is left out.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        found = _results(truth, detections)
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU threshold, recall, class; all areas, 100 detections
    per_class = {names[category]: _mean(precision[:, :, k]) for k, category in enumerate(evaluation.params.catIds)}
    order = [category["name"] for category in ground_truth["categories"]]
    headline = [100 * float(value) if value > -1 else float("nan") for value in evaluation.stats[:6]]
    ap, ap50, ap75, small, medium, large = headline
    in_order = {name: per_class[name] for name in order}
    return CocoMetrics(ap, ap50, ap75, small, medium, large, in_order, images=len(image_ids))


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
    return float(100 * counted.mean()) if counted.size else float("nan")
