"""The figures of rows of runs: means over seeds, and paired differences with their confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from headkd_ray.comparison.run_rows import Row
from headkd_ray.comparison.spread import Spread, paired, spread
from headkd_ray.diagnosis.detector_diagnosis import Diagnosis, diagnose
from headkd_ray.diagnosis.overlaps import Floats, Ints, overlaps
from headkd_ray.diagnosis.resampling import ResampledAP, interval
from headkd_ray.engine.coco_metrics import CocoMetrics, coco_metrics

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Measured:
    """A detector on the split that rows are compared on."""

    metrics: CocoMetrics
    diagnosis: Diagnosis
    resampled: Floats
    """(B,) AP in percent on each resample of the images."""
    results: list[dict[str, Any]]
    """COCO results."""


@dataclass(frozen=True)
class RowFigures:
    """A row's figures."""

    name: str
    seeds: tuple[int, ...]
    metrics: Mapping[str, Spread]
    """By name in ``METRICS``, in percent."""
    per_class: Mapping[str, Spread]
    gain: Spread | None
    """AP minus that of the reference, seed by seed; None for the reference, and without a common seed."""
    interval: tuple[float, float] | None
    """95 % confidence interval of the gain's mean, over seeds and images."""
    hours: Spread


def measure(truth: Mapping[str, Any], results: list[dict[str, Any]], max_detections: int, weights: Ints) -> Measured:
    """Measure COCO results on their ground truth, and on the resamples of ``weights`` (``resamples``)."""
    image_ids = [image["id"] for image in truth["images"]]
    metrics = coco_metrics(dict(truth), results, image_ids, max_detections)
    pairs = overlaps(truth, results, max_detections)
    return Measured(metrics, diagnose(pairs), ResampledAP(pairs)(weights), results)


def figures_of(row: Row, measured: Mapping[int, Measured], reference: Mapping[int, Measured] | None) -> RowFigures:
    """Return a row's figures.

    Args:
        measured: by seed.
        reference: those of the row that it is compared with; None if it is that row.
    """
    common = [] if reference is None else sorted(measured.keys() & reference.keys())
    gain, between = None, None
    if reference is not None and common:
        ours, theirs = ({seed: each.metrics.AP for seed, each in side.items()} for side in (measured, reference))
        gain = spread(paired(ours, theirs))
        between = interval(np.stack([measured[seed].resampled - reference[seed].resampled for seed in common]))
    classes = next(iter(measured.values())).metrics.per_class
    hours = [run.hours for run in row.runs.values() if run.hours is not None]
    return RowFigures(
        row.name,
        tuple(measured),
        {name: spread([getattr(each.metrics, name) for each in measured.values()]) for name in METRICS},
        {name: spread([each.metrics.per_class[name] for each in measured.values()]) for name in classes},
        gain,
        between,
        spread(hours),
    )
