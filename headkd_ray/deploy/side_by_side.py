"""Run a checkpoint and the files that were exported from it on the images of a prepared split, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headkd_ray.data.sample import Sample
from headkd_ray.data.shards import ShardSet
from headkd_ray.deploy.agreement import Agreement
from headkd_ray.deploy.entrants import Entrant
from headkd_ray.deploy.graph import RawGraph
from headkd_ray.deploy.networks import FileNetwork, graph_inputs
from headkd_ray.detectors import TwoStageDetector
from headkd_ray.engine.coco_metrics import CocoMetrics, coco_metrics
from headkd_ray.engine.inference import batch_of
from headkd_ray.engine.scoring import Scoring
from headkd_ray.errors import DataError

Track = Callable[[Iterable[Sample]], Iterable[Sample]]
"""Shows progress over samples."""


class Tried(NamedTuple):
    """What came of :func:`detect_side_by_side`."""

    metrics: dict[str, CocoMetrics]
    """By the entrant's name."""
    agreements: dict[str, Agreement]
    """Of each exact file with the checkpoint, by its name."""


def detect_side_by_side(
    entrants: Sequence[Entrant],
    scorings: Mapping[str, Scoring],
    shards: ShardSet,
    limit: int | None,
    track: Track,
) -> Tried:
    """Detect with all ``entrants`` on the first ``limit`` images of the split; None = all.

    Args:
        entrants: the checkpoint, then others.
        scorings: how each is scored, by its name.

    Raises:
        DataError: an image of the split cannot be read.
    """
    entries: dict[str, list[dict[str, Any]]] = {entrant.name: [] for entrant in entrants}
    agreements = {entrant.name: Agreement() for entrant in entrants if entrant.exact}
    image_ids = []
    for sample in track(shards.samples(limit)):
        pixels = pixels_of(sample)
        image_ids.append(sample.image_id)
        found = {entrant.name: entrant.predictor.detect(pixels) for entrant in entrants}
        for name, detections in found.items():
            entries[name] += detections.to_coco(sample.image_id, scorings[name].category_ids)
        for name, agreement in agreements.items():
            agreement.add(found[entrants[0].name], found[name], sample.image_id)
    truth = shards.ground_truth()
    metrics = {name: coco_metrics(truth, found, image_ids, scorings[name].max_detections) for name, found in entries.items()}
    return Tried(metrics, agreements)


def raw_error(graph: RawGraph, file: FileNetwork, shards: ShardSet, limit: int | None, track: Track) -> float:
    """Return the largest difference of the file's outputs from those of ``graph``, relative to the output's largest magnitude.

    Raises:
        DataError: an image of the split cannot be read.
    """
    worst = 0.0
    for sample in track(shards.samples(limit)):
        batch = batch_of(pixels_of(sample), file.description.view, canvas=file.description.size)
        given = graph_inputs(batch)
        with torch.inference_mode():
            outputs = graph(torch.from_numpy(given["images"]), torch.from_numpy(given["sizes"]))
        for tensor, theirs in zip(outputs.values(), file.run(batch), strict=True):
            ours = tensor.numpy()
            if ours.shape != theirs.shape:
                return float("inf")
            if isinstance(graph.detector, TwoStageDetector):  # rounding decides ties in the order of RoIs
                ours, theirs = np.sort(ours, axis=1), np.sort(theirs, axis=1)
            worst = max(worst, float(np.abs(ours - theirs).max(initial=0.0) / np.abs(ours).max(initial=1e-12)))
    return worst


def pixels_of(sample: Sample) -> Tensor:
    """Return the pixels of a sample, uint8 (3, H, W). Raises DataError naming the image if it cannot be decoded."""
    try:
        return sample.pixels()
    except ValueError as error:
        raise DataError(f"image {sample.image_id} in the prepared shards: {error}; prepare the split again") from error
