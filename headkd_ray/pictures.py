"""Pictures of a split's images with the detections of several runs, or with one's mistakes, beside the ground truth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors.weights.fetch import fetch_detector
from headkd_ray.diagnosis.detector_diagnosis import Diagnosis
from headkd_ray.engine.inference import detect_images, view_spec
from headkd_ray.report.draw import TILE, contact_sheet, draw, draw_found, jpeg
from headkd_ray.report.fonts import drawable

SHOWN_SCORE = 0.4
"""Minimum score of the detections in the picture."""
GAP = 8
"""Pixels between the pictures of a row, and between rows."""
LONGEST_SIDE = 640
"""Longer side of a picture of mistakes, in pixels; larger images are shrunk to it."""


def compare(shards: ShardSet, results: Mapping[str, Mapping[str, Any]], images: int = 4) -> tuple[bytes, str | None]:
    """Draw images of the split, one per row, with columns for ground truth and for each run's detections.

    Args:
        results: result of each run, as returned by ``train``.
    Returns:
        The picture as PNG, and a note on class names that cannot be drawn, if any.
    """
    rows_of_first_group = list(range(min(images, len(shards.index))))
    samples = shards.read_group(0, 0, rows_of_first_group)
    pixels = [sample.pixels() for sample in samples]
    names, note = drawable(dict(enumerate(shards.meta.classes)))
    columns = [
        [
            draw(
                image,
                torch.from_numpy(sample.boxes),
                torch.from_numpy(sample.labels),
                [names[label] for label in sample.labels.tolist()],
                TILE,
            )
            for image, sample in zip(pixels, samples, strict=True)
        ]
    ]
    titles = ["ground truth"]
    for name, result in results.items():
        loaded = fetch_detector(result["student"])
        known, _ = drawable(dict(enumerate(loaded.classes or shards.meta.classes)))
        found = detect_images(loaded.detector, pixels, view_spec(loaded.meta), list(known), torch.device("cpu"))
        columns.append(
            [draw_found(image, entries, known, SHOWN_SCORE, TILE) for image, entries in zip(pixels, found, strict=True)]
        )
        average_precision = result["best"]["AP"]
        titles.append(name if average_precision is None else f"{name}: AP {average_precision:.1f}")
    return contact_sheet(list(zip(*columns, strict=True)), titles), note


Findings = tuple[Diagnosis, Sequence[Mapping[str, Any]]]
"""A detector's diagnosis on a split, and the COCO results that it is of."""
Shown = tuple[Mapping[str, float | None], Sequence[Mapping[str, Any]]]
"""The least score of each class that is drawn, by name, None = nothing of it, and COCO results."""


def mistakes(shards: ShardSet, findings: Findings, most: int = 12) -> Iterator[tuple[str, bytes]]:
    """Draw the images with most mistakes: ground truth on the left, detections at each class's best threshold on the right.

    Yields:
        A caption and a JPEG file for each image.
    """
    worst = dict(list(findings[0].mistakes.items())[:most])
    named = _named(shards, worst)
    for image_id, count in worst.items():
        yield f"{named[image_id]}: {_counted(count)}", jpeg(_beside_truth(shards, image_id, [_shown(findings)]))


def disagreements(shards: ShardSet, detectors: Mapping[str, Findings], most: int = 8) -> Iterator[tuple[str, bytes]]:
    """Draw the images on which the detectors' numbers of mistakes differ most: ground truth, then each detector's detections.

    Yields:
        A caption and a JPEG file for each image.
    """
    counts = [diagnosis.mistakes for diagnosis, _ in detectors.values()]
    images = dict.fromkeys(image_id for each in counts for image_id in each)
    ranges = {image_id: [each.get(image_id, 0) for each in counts] for image_id in images}
    order = sorted(images, key=lambda image_id: max(ranges[image_id]) - min(ranges[image_id]), reverse=True)
    named = _named(shards, order[:most])
    for image_id in order[:most]:
        if len(set(ranges[image_id])) == 1:
            return
        told = ", ".join(f"{name}: {_counted(count)}" for name, count in zip(detectors, ranges[image_id], strict=True))
        yield (
            f"{named[image_id]}: ground truth, then {told}",
            jpeg(_beside_truth(shards, image_id, list(map(_shown, detectors.values())))),
        )


def samples(shards: ShardSet, image_ids: Sequence[int], shown: Shown) -> bytes:
    """Draw images, one per row: ground truth on the left, a detector's detections on the right; a JPEG file."""
    strips = [_beside_truth(shards, image_id, [shown]) for image_id in image_ids]
    width = max(strip.shape[2] for strip in strips)
    rows = [torch.nn.functional.pad(strip, (0, width - strip.shape[2], 0, GAP), value=255) for strip in strips]
    return jpeg(torch.cat(rows, dim=1))


def _shown(findings: Findings) -> Shown:
    return findings[0].thresholds, findings[1]


def _named(shards: ShardSet, image_ids: Iterable[int]) -> dict[int, str]:
    """Return what captions call images: their file names and ids."""
    rows = {int(np.flatnonzero(shards.index.image_id == image_id)[0]): image_id for image_id in image_ids}
    return {rows[row]: f"{name} (image {rows[row]})" for row, name in shards.names_at(rows).items()}


def _counted(mistakes: int) -> str:
    return "1 mistake" if mistakes == 1 else f"{mistakes} mistakes"


def _beside_truth(shards: ShardSet, image_id: int, detectors: Sequence[Shown]) -> Tensor:
    """Draw an image's ground truth and, beside it, the detections of each detector: uint8 (3, H, W)."""
    meta = shards.meta
    names, _ = drawable(dict(enumerate(meta.classes)))
    known = {id_: names[label] for label, id_ in enumerate(meta.category_ids)}
    sample = shards.sample_at(int(np.flatnonzero(shards.index.image_id == image_id)[0]))
    pixels = sample.pixels()
    factor = min(1.0, LONGEST_SIDE / max(pixels.shape[-2:]))
    if factor < 1:
        pixels = resize(pixels, [max(1, round(side * factor)) for side in pixels.shape[-2:]], antialias=True)
    captions = [names[label] for label in sample.labels.tolist()]
    tiles = [draw(pixels, torch.from_numpy(sample.boxes) * factor, torch.from_numpy(sample.labels), captions, TILE)]
    for thresholds, results in detectors:
        limits = {id_: thresholds[name] for id_, name in zip(meta.category_ids, meta.classes, strict=True)}
        smaller = [
            {**entry, "bbox": [factor * each for each in entry["bbox"]]}
            for entry in results
            for limit in [limits[entry["category_id"]]]
            if entry["image_id"] == image_id and limit is not None and entry["score"] >= limit
        ]
        gap = torch.full((3, tiles[0].shape[1], GAP), 255, dtype=torch.uint8)
        tiles += [gap, draw_found(pixels, smaller, known, 0.0, TILE)]
    return torch.cat(tiles, dim=2)
