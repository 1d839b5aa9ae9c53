"""How a detector's answers on a split are scored: as which categories, how many an image, and what the user should know."""

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
    """What turns detections on a split into its metrics."""

    category_ids: tuple[int | None, ...]
    """COCO category id of each of the detector's classes in the split; None = the split does not list the class, so that
    nothing can be said about its detections, and they are left out."""
    max_detections: int
    """How many of an image's detections count."""
    warnings: tuple[str, ...]


def scoring_of(shards: ShardSet, split: str, classes: Sequence[str], who: str, max_detections: int) -> Scoring:
    """How detections of ``classes`` are scored on a split.

    Args:
        split: how messages call the split.
        classes: the detector's, in the order of its outputs.
        who: how messages call whoever has these classes.

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
    """How many detections of an image count where the checkpoint with this ``meta`` was trained; 100 if it does not say.

    Raises:
        CheckpointError: it says something else.
    """
    recorded = meta.get("max_detections", MAX_DETECTIONS)
    if not isinstance(recorded, int) or isinstance(recorded, bool) or recorded < 1:
        raise CheckpointError(f"model.json: meta.max_detections {recorded!r} is not a number of detections")
    return recorded


def scoring_of_job(job: Job, train: ShardSet, val: ShardSet) -> Scoring:
    """How a job's student, which learns the classes of ``train``, is scored on ``val``. Raises as :func:`scoring_of` does."""
    split, who = f"data.val ({job.data.val})", f"data.train ({job.data.train})"
    return scoring_of(val, split, train.meta.classes, who, job.eval.max_detections)
