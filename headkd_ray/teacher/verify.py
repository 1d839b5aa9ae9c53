"""Opening the builder of a job's cache in this process, and verifying the cache against the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from headkd_ray.data.batch import collate
from headkd_ray.data.epoch_order import train_rows
from headkd_ray.data.rng import key_permutation
from headkd_ray.data.training_set import training_set
from headkd_ray.errors import JobError
from headkd_ray.job import Job
from headkd_ray.soft_targets import ViewTargets
from headkd_ray.teacher import Builder, builder_of
from headkd_ray.teacher.loading import teacher_of


def open_builder(job: Job, device: torch.device | str = "cpu") -> Builder:
    """Open the builder that fills the job's cache, on ``device``; nothing is written yet.

    Raises JobError if the job's teacher cannot be cached; DataError, CheckpointError as their readers do.
    """
    if job.teacher is None or job.distill.rois != "teacher":
        raise JobError(
            "distill.rois: a cache holds the teacher's features at RoIs that it chose itself; use a job of method akd or head "
            "with distill.rois: teacher"
        )
    shards = training_set(job)
    return builder_of(job, shards, teacher_of(job, shards.meta.classes), device)


@dataclass(frozen=True)
class Agreement:
    """How a cache's targets compare with those that the teacher computes now, over a sample of views."""

    views: int
    same_rois: int
    """Number of views for which the teacher would choose exactly the same RoIs now. Another device or batch size rounds
    differently, and may let one in or out."""
    cosine: float
    """Mean cosine between cached and present features over the cached RoIs and layers; NaN if there are no RoIs."""
    least_cosine: float
    worst: float
    """Greatest difference of a feature, as a share of the greatest feature."""
    same_class: float | None
    """Share of the cached RoIs whose cached class the teacher still predicts; NaN if there are no RoIs, None if no logits are
    kept."""


def verify(builder: Builder, sample: int, seed: int = 0) -> Agreement:
    """Run the teacher again on ``sample`` views drawn by ``seed``. Raises CacheError if the cache is incomplete."""
    cache = builder.cache
    cache.check()
    index = cache.shards.index
    trained = train_rows(index, builder.maker.spec.keep_empty)
    order = key_permutation(len(trained) * cache.views, "verify", seed)[:sample].tolist()
    cosines, same, gap, most = [], 0, 0.0, 0.0
    agree: list[np.ndarray] = []
    for number in order:
        row, view = int(trained[number // cache.views]), number % cache.views
        shard, place = int(index.shard[row]), int(index.row[row])
        group = place // index.row_group
        ((sample_of, example),) = builder.shown(shard, view, [place])
        assert example is not None  # train_rows are trained on
        (packed,) = cache.read_group(shard, group, [place], view)
        kept = cache.unpack(packed, sample_of.image_id, view)
        batch = collate([example], 0, builder.maker.spec.pad).to(builder.teacher.device)
        same += same_rois(kept, builder.answer(batch)[0])
        boxes = torch.from_numpy(kept.boxes).to(builder.teacher.device)
        taps, _, classes = builder.teacher.answers_at(batch, boxes, min(cache.codec.logits, 1))
        live = taps.cpu().numpy()
        if cache.codec.logits:
            agree.append(kept.top.classes[:, 0] == classes.flatten().cpu().numpy())
        cosines.append(cosine(kept.taps, live))
        gap, most = max(gap, float(np.abs(kept.taps - live).max(initial=0))), max(most, float(np.abs(live).max(initial=0)))
    every = np.concatenate([c.ravel() for c in cosines]) if cosines else np.array([np.nan])
    same_class = float(np.concatenate(agree).mean()) if agree else None
    return Agreement(len(order), same, float(every.mean()), float(every.min()), gap / most if most else 0.0, same_class)


def same_rois(one: ViewTargets, other: ViewTargets) -> bool:
    """Return whether both have the same number of RoIs, with boxes equal to a hundredth of a pixel."""
    return one.boxes.shape == other.boxes.shape and bool(np.allclose(one.boxes, other.boxes, rtol=0, atol=0.01))


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosines (L, k) of features (L, k, D): 1 where both are zero, 0 where only one is."""
    lengths, others = np.linalg.norm(one, axis=-1), np.linalg.norm(other, axis=-1)
    norms = lengths * others
    return np.where(norms > 0, (one * other).sum(-1) / np.where(norms > 0, norms, 1), lengths == others)
