"""The recipe of a cache: everything that a job's soft targets depend on. Caches with equal recipes hold equal targets."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from headkd_ray.data.shards import ShardSet
from headkd_ray.data.training_set import splits_of
from headkd_ray.data.views import distinct_views
from headkd_ray.detectors import Detector
from headkd_ray.detectors.state_dict import add_to_digest
from headkd_ray.job import AugmentSpec, DataSpec, Job
from headkd_ray.teacher.source import TeacherSource

Recipe = dict[str, Any]


def recipe_of(job: Job, shards: ShardSet, teacher: TeacherSource) -> Recipe:
    """Return the recipe's fields, named after the keys that a user would change, with JSON values."""
    assert job.teacher is not None
    data = job.data
    return {
        **teacher.recipe(logits=job.teacher.cache.logits > 0),
        "teacher.precision": job.teacher.precision,
        **{f"{key} (contents)": _contents(split) for key, split in splits_of(shards).items()},
        "data.short_side": list(data.short_side),
        "data.long_side": data.long_side,
        "data.flip": data.flip,
        "data.pad": data.pad,
        "data.keep_empty": data.keep_empty,
        "data.view_seed (or run.seed)": view_seed(job),
        **_augmented(data),
        "distill.roi_budget": job.distill.roi_budget,
        "teacher.cache.dtype": job.teacher.cache.dtype,
        "teacher.cache.logits": job.teacher.cache.logits,
    }


def digest(recipe: Recipe) -> str:
    """Return the SHA-256 of all fields."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def view_seed(job: Job) -> int:
    """Return the seed of the views, and of the RoIs of a teacher that chooses its own."""
    return job.run.seed if job.data.view_seed is None else job.data.view_seed


def views_of(job: Job) -> int:
    """Return the number of distinct views of each image in the run's epochs."""
    return distinct_views(job.optim.epochs, job.data)


def _augmented(data: DataSpec) -> Recipe:
    """Return the keys of data.augment and the like; none if all have their defaults, so that older caches stay valid."""
    keys = data.augment.model_dump(mode="json") if data.augment != AugmentSpec() else {}
    decoded = {"data.reduced_decode": True} if data.reduced_decode else {}
    return decoded | {f"data.augment.{key}": value for key, value in keys.items()}


def _contents(shards: ShardSet) -> str:
    """Return the SHA-256 of annotations, layout and images."""
    parts = [shards.meta.fingerprint, *(shard.sha256 for shard in shards.meta.shards)]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def weights_digest(teacher: Detector, classes: bool) -> str:
    """Return the SHA-256 of the architecture and of all tensors that soft targets depend on.

    The RoI head's box layer is left out, for it is never run, and so is its class layer unless ``classes``.
    """
    found = hashlib.sha256(
        teacher.spec.model_dump_json(exclude={"backbone": {"weights"}, "checkpoint": True, "classes": True}).encode()
    )
    adapted = ("roi.box_out.",) if classes else ("roi.box_out.", "roi.cls_out.")  # to the data's classes
    add_to_digest(found, {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith(adapted)})
    return found.hexdigest()
