"""Distributed evaluation of a detector: each image is evaluated once, and rank 0 computes COCO metrics of all predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from headkd_ray.data.batch import Batch
from headkd_ray.detectors import Detections, Detector
from headkd_ray.engine.coco_metrics import CocoMetrics, coco_metrics
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.scoring import Scoring


class InterruptedEvaluationError(Exception):
    """An evaluation was given up before its end, on all ranks."""


@torch.inference_mode()
def predict(
    detector: Detector,
    batches: Iterable[Batch],
    device: torch.device,
    category_ids: Sequence[int | None],
    precision: str = "fp32",
) -> dict[int, list[dict[str, Any]]]:
    """Return COCO results by image id: bbox xywh in pixels of the stored image, with the data set's own category ids.

    Args:
        category_ids: category id of each of the detector's classes; None = omit detections of this class.

    Raises:
        AssertionError: an image came twice (which the data order rules out; a duplicate would silently inflate the metrics).
    """
    was_training = detector.training
    detector.eval()
    results: dict[int, list[dict[str, Any]]] = {}
    try:
        for batch in batches:
            if batch.idle:
                continue
            batch = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                found = detector.detect(detector.normalise(batch.images, batch.sizes), batch.sizes)
            for image_id, entries in zip(batch.image_ids.tolist(), coco_results(found, batch, category_ids), strict=True):
                assert image_id not in results, f"image {image_id} was evaluated twice"
                results[image_id] = entries
    finally:
        detector.train(was_training)
    return results


def coco_results(found: Detections, batch: Batch, category_ids: Sequence[int | None]) -> list[list[dict[str, Any]]]:
    """Return one list of COCO results per image of the batch, with boxes scaled to the stored image and clipped to it.

    Args:
        category_ids: as in :func:`predict`.
    """
    boxes = in_original_pixels(found.boxes, batch.sizes, batch.original_sizes)
    xywh = torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1).tolist()
    rows = zip(batch.image_ids.tolist(), xywh, found.scores.tolist(), found.labels.tolist(), strict=True)
    return [
        [
            {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
            for box, score, label in zip(*columns, strict=True)
            if label >= 0 and category_ids[label] is not None
        ]
        for image_id, *columns in rows
    ]


def in_original_pixels(boxes: Tensor, sizes: Tensor, original_sizes: Tensor) -> Tensor:
    """Scale ``boxes`` (B, N, 4) from images of ``sizes`` (B, 2) h, w to their ``original_sizes`` (B, 2), and clip them."""
    factors = (original_sizes.float() / sizes.float())[:, [1, 0, 1, 0]][:, None]
    limits = original_sizes.float()[:, [1, 0, 1, 0]][:, None]
    return torch.minimum((boxes.float() * factors).clamp_min(0), limits)


def evaluate(
    detector: Detector,
    batches: Iterable[Batch],
    distributed: Distributed,
    ground_truth: dict[str, Any] | None,
    scoring: Scoring,
    precision: str = "fp32",
    keep: Callable[[CocoMetrics, list[dict[str, Any]]], None] = lambda metrics, results: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> CocoMetrics:
    """Compute COCO metrics over all ranks' shares of the images, and return them on every rank. A collective call.

    The ranks only meet at the end of their shares, so asking them to stop costs no communication: one that is ``interrupted``
    brings none to that meeting.

    Args:
        ground_truth: COCO dictionary, needed on rank 0 only.
        scoring: which categories the detections are counted as, and how many count.
        keep: called on rank 0 with the metrics and the COCO results that they are of.
        interrupted: asked by each rank before each batch; if it is True on any, the evaluation is given up on all of them.

    Raises:
        InterruptedEvaluationError: it was given up.
        AssertionError: the ranks' shares overlap or miss an image of ``ground_truth``.
    """
    share: dict[int, list[dict[str, Any]]] | None = None
    with suppress(InterruptedEvaluationError):
        share = predict(detector, _until(interrupted, batches), distributed.device, scoring.category_ids, precision)
    gathered = distributed.gather(share)
    metrics = None
    shares = [each for each in gathered or [] if each is not None]
    if gathered is not None and len(shares) == len(gathered):
        assert ground_truth is not None
        image_ids = [image_id for share in shares for image_id in share]
        assert sorted(image_ids) == sorted(image["id"] for image in ground_truth["images"]), "ranks overlap or miss images"
        found = [entry for share in shares for entries in share.values() for entry in entries]
        metrics = coco_metrics(ground_truth, found, image_ids, scoring.max_detections)
        keep(metrics, found)
    metrics = distributed.broadcast(metrics)
    if metrics is None:
        raise InterruptedEvaluationError
    return metrics


def _until(interrupted: Callable[[], bool], batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches, or raise InterruptedEvaluationError instead of the next one."""
    for batch in batches:
        if interrupted():
            raise InterruptedEvaluationError
        yield batch
