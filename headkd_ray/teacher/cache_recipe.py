"""What the soft targets of a job depend on, field by field: two caches with equal fields hold the same answers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import Detector
from headkd_ray.job import Job

Recipe = dict[str, Any]


def recipe_of(job: Job, shards: ShardSet, teacher: Detector) -> Recipe:
    """The fields, named by the keys that a user would change; JSON values."""
    assert job.teacher is not None
    data = job.data
    return {
        "teacher.checkpoint (weights)": _digest(teacher, classes=job.teacher.cache.logits > 0),
        "teacher.precision": job.teacher.precision,
        "data.train (contents)": _contents(shards),
        "data.short_side": list(data.short_side),
        "data.long_side": data.long_side,
        "data.flip": data.flip,
        "data.pad": data.pad,
        "data.keep_empty": data.keep_empty,
        "data.view_seed (or run.seed)": view_seed(job),
        "distill.roi_budget": job.distill.roi_budget,
        "teacher.cache.dtype": job.teacher.cache.dtype,
        "teacher.cache.logits": job.teacher.cache.logits,
    }


def digest(recipe: Recipe) -> str:
    """SHA-256 of all fields."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def view_seed(job: Job) -> int:
    """What draws the views, and the RoIs of a teacher that chooses its own."""
    return job.run.seed if job.data.view_seed is None else job.data.view_seed


def views_of(job: Job) -> int:
    """Distinct views of each image that the run's epochs show."""
    return job.optim.epochs if job.data.views is None else min(job.data.views, job.optim.epochs)


def _contents(shards: ShardSet) -> str:
    """SHA-256 of annotations, layout and images."""
    parts = [shards.meta.fingerprint, *(shard.sha256 for shard in shards.meta.shards)]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def _digest(teacher: Detector, classes: bool) -> str:
    """SHA-256 of the architecture and all tensors but those of the RoI head's last layers: nobody asks that of boxes, and that
    of classes only for logits."""
    found = hashlib.sha256(teacher.spec.model_dump_json(exclude={"backbone": {"weights"}}).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        if name.startswith("roi.box_out.") or (name.startswith("roi.cls_out.") and not classes):
            continue  # they follow the data's classes
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()
