"""Construction of a job's soft teacher, cache and cache builder."""

from __future__ import annotations

import os

import torch

from headkd_ray.data.batch_stream import BatchMaker
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors.two_stage import answers_about_rois
from headkd_ray.errors import JobError
from headkd_ray.job import Job
from headkd_ray.storage import Folder
from headkd_ray.teacher.cache_builder import Builder
from headkd_ray.teacher.cache_codec import Codec
from headkd_ray.teacher.cache_recipe import recipe_of, view_seed, views_of
from headkd_ray.teacher.soft_teacher import SoftTeacher
from headkd_ray.teacher.source import AnyTeacher, TeacherSource
from headkd_ray.teacher.target_cache import Cache


def soft_teacher(job: Job, teacher: AnyTeacher, device: torch.device | str = "cpu") -> TeacherSource:
    """Return the job's teacher as one that chooses its own RoIs, on ``device``. Raises JobError if it cannot."""
    return _source(job, teacher).to(device)


def _source(job: Job, teacher: AnyTeacher) -> TeacherSource:
    assert job.teacher is not None
    if isinstance(teacher, TeacherSource):
        return teacher
    if not answers_about_rois(teacher):
        raise JobError(
            "teacher.checkpoint: the teacher must choose the RoIs, which a faster_rcnn or a DETR (teacher.kind: transformers) "
            f"can; this one is a {teacher.spec.kind}"
        )
    return SoftTeacher(teacher, job.distill.roi_budget, view_seed(job), job.data.pad, job.teacher.precision)


def open_cache(job: Job, shards: ShardSet, teacher: AnyTeacher) -> Cache:
    """Return the job's cache as it should be, without reading or checking anything yet. Raises as :func:`soft_teacher`."""
    assert job.teacher is not None
    where, source = job.teacher.cache.path, _source(job, teacher)
    folder = shards.folder / "soft_targets" if where is None else Folder.open(where)
    return Cache(folder, recipe_of(job, shards, source), shards, views_of(job), codec_of(job, source), job.distill.roi_budget)


def codec_of(job: Job, teacher: AnyTeacher) -> Codec:
    """Return the codec of a cache of this teacher's soft targets. Raises as :func:`soft_teacher`."""
    assert job.teacher is not None
    source = _source(job, teacher)
    # A teacher may have fewer classes, background included, than teacher.cache.logits asks for.
    logits = min(job.teacher.cache.logits, source.num_logits)
    return Codec(job.teacher.cache.dtype, source.layers, source.width, logits, source.signed)


def builder_of(job: Job, shards: ShardSet, teacher: AnyTeacher, device: torch.device | str = "cpu") -> Builder:
    """Return the builder that fills the job's cache."""
    assert job.teacher is not None
    cache, soft = open_cache(job, shards, teacher), soft_teacher(job, teacher, device)
    maker = BatchMaker(job.data, view_seed(job), train=True)
    # On a cluster, the CPUs that the pool reserves for a process; without one, those of the machine.
    cpus = min(8, os.cpu_count() or 1) if job.cluster.workers == 0 else int(job.teacher.pool.cpus)
    return Builder(cache, soft, maker, job.teacher.batch_size, threads=max(1, cpus))
