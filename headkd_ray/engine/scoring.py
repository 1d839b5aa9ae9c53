"""How a detector is scored on a split: category ids of its classes, detections that count per image, and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headkd_ray.data.class_lists import ids_of_known, left_out
from headkd_ray.data.shards import ShardSet
from headkd_ray.errors import CheckpointError
from headkd_ray.job import Job
from headkd_ray.job.job import MAX_DETECTIONS


@dataclass(frozen=True)
class Scoring:
    """How a detector's outputs on a split are turned into COCO metrics."""

    category_ids: tuple[int | None, ...]
    """COCO category id of each of the detector's classes in the split; None = the split does not list the class, so its
    detections cannot be judged and are left out."""
    max_detections: int
    """How many of an image's detections count."""
    warnings: tuple[str, ...]
    """What the user should know about the metrics, one sentence each."""


def scoring_of(shards: ShardSet, split: str, classes: Sequence[str], who: str, max_detections: int) -> Scoring:
    """Return how detections of ``classes`` are scored on a split.

    Args:
        split: name of the split in messages.
        classes: the detector's classes, in the order of its outputs.
        who: name of the detector, or of the data that it learns from, in messages.

    Raises:
        DataError: the split has classes that the detector does not know.
    """
    category_ids = ids_of_known(who, classes, split, dict(zip(shards.meta.classes, shards.meta.category_ids, strict=True)))
    warnings = left_out(who, classes, split, shards.meta.classes)
    full = shards.index.boxes[shards.index.boxes > max_detections]
    if len(full):
        warnings.append(
            f"{split} has more than {max_detections} objects in {len(full)} of {len(shards.index)} images (up to "
            f"{full.max()}), but only the best {max_detections} detections of an image count; set eval.max_detections "
            f"(evaluate: --max-detections) to {full.max()}"
        )
    return Scoring(category_ids, max_detections, tuple(warnings))


def recorded_detections(meta: Mapping[str, Any]) -> int:
    """Return how many detections per image counted when the checkpoint with this ``meta`` was trained; 100 if not recorded.

    Raises CheckpointError as :func:`recorded_count`.
    """
    return recorded_count(meta, "max_detections", MAX_DETECTIONS)


def recorded_count(meta: Mapping[str, Any], key: str, otherwise: int) -> int:
    """Return the positive integer at ``key`` of a checkpoint's ``meta``, or ``otherwise`` if it is not recorded.

    Raises:
        CheckpointError: the recorded value is not a positive integer.
    """
    recorded = meta.get(key, otherwise)
    if not isinstance(recorded, int) or isinstance(recorded, bool) or recorded < 1:
        raise CheckpointError(f"model.json: meta.{key} {recorded!r} is not a positive integer")
    return recorded


def scoring_of_job(job: Job, train: ShardSet, val: ShardSet) -> Scoring:
    """Return how a job's student, which learns the classes of ``train``, is scored on ``val``. Raises as :func:`scoring_of`."""
    split, who = f"data.val ({job.data.val})", f"data.train ({job.data.train})"
    return scoring_of(val, split, train.meta.classes, who, job.eval.max_detections)
