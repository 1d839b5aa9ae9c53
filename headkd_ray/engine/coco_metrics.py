"""COCO box metrics; a metric that cannot be computed is NaN, never 0.

They are computed with faster-coco-eval, or with pycocotools, the reference, where it is not installed. Both give the same
figures up to rounding, 1e-15 of them, and pycocotools takes eight times as long (``python bench/evaluation.py``).
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from headkd_ray.diagnosis.curves import curves
from headkd_ray.diagnosis.overlaps import overlaps

try:
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval
except ImportError:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

Records = list[dict[str, Any]]
PIECE = 250_000
"""Number of detections, and of pairs of an image and a class, that are scored at a time: the libraries take 1 kB for each."""


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
    thresholds: dict[str, float]
    """Score threshold with the highest F1 at IoU 0.5, by class name, in the data set's class order; NaN if nothing right is
    found."""
    images: int
    """Number of images evaluated."""

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics for JSON, which has no NaN: a metric that cannot be computed is None."""
        values = asdict(self)
        for by_class in ("per_class", "thresholds"):
            values[by_class] = {name: _known(value) for name, value in values[by_class].items()}
        return {name: _known(value) for name, value in values.items()}


def coco_metrics(
    ground_truth: dict[str, Any], detections: list[dict[str, Any]], image_ids: list[int], max_detections: int = 100
) -> CocoMetrics:
    """Evaluate detections.

    Args:
        ground_truth: COCO dictionary: images, annotations (bbox, area, iscrowd, category_id), categories. Ids may be any
            integers. It is not modified.
        detections: COCO results: image_id, category_id, bbox (xywh, pixels of the stored image), score.
        image_ids: the images that were evaluated; ground truth and detections of other images are ignored.
        max_detections: how many of an image's best detections count in each class.
    """
    images = _ranks(image_ids)
    pieces = _pieces(ground_truth, detections, images)
    precision = np.concatenate([_precision(piece, images, max_detections) for piece in pieces], axis=2)
    categories = _ranks(category["id"] for category in ground_truth["categories"])
    small, medium, large = (_mean(precision[:, :, :, area]) for area in (1, 2, 3))
    overall = precision[:, :, :, 0]
    return CocoMetrics(
        AP=_mean(overall),
        AP50=_mean(overall[0]),
        AP75=_mean(overall[5]),
        APs=small,
        APm=medium,
        APl=large,
        per_class={
            category["name"]: _mean(overall[:, :, categories[category["id"]] - 1]) for category in ground_truth["categories"]
        },
        thresholds=_thresholds(ground_truth, detections, image_ids, max_detections),
        images=len(image_ids),
    )


@dataclass(frozen=True)
class _Piece:
    """Some of the classes, and what the evaluated images have of them."""

    categories: dict[int, int] = field(default_factory=dict)
    """Rank of each class among all, by id; ascending."""
    annotations: Records = field(default_factory=list)
    detections: Records = field(default_factory=list)


def _pieces(ground_truth: dict[str, Any], detections: Records, images: Mapping[int, int]) -> list[_Piece]:
    """Divide the classes, which are scored independently of each other, into pieces of about ``PIECE``."""
    found = Counter(each["category_id"] for each in detections)
    pieces: list[_Piece] = []
    piece_of: dict[int, _Piece] = {}
    room = 0
    for id_, rank in _ranks(category["id"] for category in ground_truth["categories"]).items():
        needed = len(images) + found[id_]
        if not pieces or needed > room:
            pieces.append(_Piece())
            room = PIECE
        room -= needed
        pieces[-1].categories[id_] = rank
        piece_of[id_] = pieces[-1]
    for annotation in ground_truth["annotations"]:
        if annotation["image_id"] in images:
            piece_of[annotation["category_id"]].annotations.append(annotation)
    for each in detections:
        if each["image_id"] in images:
            piece_of[each["category_id"]].detections.append(each)
    return pieces


def _precision(piece: _Piece, images: dict[int, int], max_detections: int) -> np.ndarray:
    """Return the precision at IoU thresholds 0.50, 0.55 …, recalls, classes of the piece and areas, float64 (10, 101, C, 4)."""
    # Ids become numbers from 1: faster-coco-eval keeps those of images and classes as float64, and both libraries record the id
    # of the annotation that a detection matched, and read an id of 0 as "no match". The area is what their loadRes adds, which
    # also makes a polygon of each box.
    found = [{**each, "area": each["bbox"][2] * each["bbox"][3], "iscrowd": 0} for each in piece.detections]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        of_truth, of_found = (_indexed(images, piece.categories, records) for records in (piece.annotations, found))
        evaluation = COCOeval(of_truth, of_found, "bbox")
        evaluation.params.maxDets = [max_detections]
        # Both ignore objects of more than 1e10 square pixels even in the area range "all".
        evaluation.params.areaRng = [[low, math.inf if high == 1e10 else high] for low, high in evaluation.params.areaRng]
        evaluation.evaluate()
        evaluation.accumulate()
    precision: np.ndarray = evaluation.eval["precision"][..., 0]
    return precision


def _thresholds(
    ground_truth: dict[str, Any], detections: list[dict[str, Any]], image_ids: list[int], max_detections: int
) -> dict[str, float]:
    wanted = set(image_ids)
    truth = {**ground_truth, "images": [image for image in ground_truth["images"] if image["id"] in wanted]}
    found = curves(overlaps(truth, detections, max_detections))
    return {each.name: math.nan if each.threshold is None else each.threshold for each in found}


def _ranks(ids: Iterable[int]) -> dict[int, int]:
    """Return the rank of each id, from 1. They keep the ids' order, which decides between detections of equal score."""
    return {id_: rank for rank, id_ in enumerate(sorted(ids), start=1)}


def _indexed(images: dict[int, int], categories: dict[int, int], records: Records) -> COCO:
    """Return annotations or detections, with ranks as their ids, as the libraries need them."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": rank} for rank in images.values()],
        "categories": [{"id": rank} for rank in categories.values()],
        "annotations": [
            {**record, "id": number, "image_id": images[record["image_id"]], "category_id": categories[record["category_id"]]}
            for number, record in enumerate(records, start=1)
        ],
    }
    coco.createIndex()
    return coco


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _mean(precision: np.ndarray) -> float:
    counted = precision[precision > -1]  # -1 marks classes without ground truth
    return 100 * float(counted.mean()) if counted.size else float("nan")
