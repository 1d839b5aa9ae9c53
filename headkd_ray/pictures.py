"""Pictures of a split's images with the detections of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors.weights.fetch import fetch_detector
from headkd_ray.engine.inference import detect_images, view_spec
from headkd_ray.report.draw import TILE, contact_sheet, draw, draw_found
from headkd_ray.report.fonts import drawable

SHOWN_SCORE = 0.4
"""Minimum score of the detections in the picture."""


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
