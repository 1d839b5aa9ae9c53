"""A cache of soft targets from a job, in this process: what fills it, and how good it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from headkd_ray.data.keyed import key_permutation
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import FasterRCNN
from headkd_ray.engine.teacher import load_teacher
from headkd_ray.errors import JobError
from headkd_ray.job import Job
from headkd_ray.targets import ViewTargets
from headkd_ray.teacher import Builder, builder_of


def open_builder(job: Job, device: torch.device | str = "cpu") -> Builder:
    """What fills the job's cache, on ``device``; nothing is written yet.

    Raises JobError if the job's answers cannot be kept; DataError, CheckpointError as their readers do.
    """
    if job.teacher is None or job.distill.rois != "teacher":
        raise JobError(
            "distill.rois: a cache holds what the teacher says about RoIs that it chose itself; use a job of method akd or "
            "head with distill.rois: teacher"
        )
    shards = ShardSet.open(job.data.train)
    torch.manual_seed(job.run.seed)
    teacher = load_teacher(job, shards.meta.classes)
    assert teacher is not None
    if not isinstance(teacher.detector, FasterRCNN):
        raise JobError(f"teacher.checkpoint: a cache needs a faster_rcnn teacher, this one is a {teacher.detector.spec.kind}")
    return builder_of(job, shards, teacher.detector, device)


@dataclass(frozen=True)
class Agreement:
    """How a cache's answers compare with the teacher's of now, over a sample of views."""

    views: int
    same_rois: int
    """Views whose RoIs are the very same; only these enter the rest."""
    cosine: float
    """Mean over RoIs and layers of the cosine of cached and live features; NaN if there are none."""
    least_cosine: float
    worst: float
    """Greatest difference of a feature, as a share of the greatest feature."""


def verify(builder: Builder, sample: int, seed: int = 0) -> Agreement:
    """Ask the teacher again about ``sample`` views drawn by ``seed``. Raises CacheError if the cache is not whole."""
    cache = builder.cache
    cache.check()
    index = cache.shards.index
    trained = np.flatnonzero(index.boxes > 0)
    order = key_permutation(len(trained) * cache.views, "verify", seed)[:sample].tolist()
    cosines, same, gap, most = [], 0, 0.0, 0.0
    for number in order:
        row, view = int(trained[number // cache.views]), number % cache.views
        shard, place = int(index.shard[row]), int(index.row[row])
        group = place // index.row_group
        ((image_id, live),) = builder.answers(shard, group, view, [place])
        (packed,) = cache.read_group(shard, group, [place], view)
        kept = cache.unpack(packed, image_id, view)
        if not same_rois(kept, live):
            continue
        same += 1
        cosines.append(cosine(kept.taps, live.taps))
        gap, most = max(gap, float(np.abs(kept.taps - live.taps).max(initial=0))), max(most, float(live.taps.max(initial=0)))
    every = np.concatenate([c.ravel() for c in cosines]) if cosines else np.array([np.nan])
    return Agreement(len(order), same, float(every.mean()), float(every.min()), gap / most if most else 0.0)


def same_rois(one: ViewTargets, other: ViewTargets) -> bool:
    """Equal number, and boxes equal to a hundredth of a pixel."""
    return one.boxes.shape == other.boxes.shape and bool(np.allclose(one.boxes, other.boxes, rtol=0, atol=0.01))


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(L, k) cosines of features (L, k, D); 1 where both are zero."""
    product = (one * other).sum(-1)
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return np.where(norms > 0, product / np.where(norms > 0, norms, 1), 1.0)
