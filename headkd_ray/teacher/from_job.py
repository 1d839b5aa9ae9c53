"""Construction of a job's soft teacher, cache and cache builder."""

from __future__ import annotations

import os

import torch

from headkd_ray.data.batch_stream import BatchMaker
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import Detector, TwoStageDetector
from headkd_ray.detectors.two_stage import answers_about_rois
from headkd_ray.job import Job
from headkd_ray.storage import Folder
from headkd_ray.teacher.cache_builder import Builder
from headkd_ray.teacher.cache_codec import Codec
from headkd_ray.teacher.cache_recipe import recipe_of, view_seed, views_of
from headkd_ray.teacher.soft_teacher import SoftTeacher
from headkd_ray.teacher.target_cache import Cache


def soft_teacher(job: Job, teacher: Detector, device: torch.device | str = "cpu") -> SoftTeacher:
    """Wrap the job's teacher as one that chooses its own RoIs, on ``device``; ``build_training_model`` has checked its kind."""
    assert job.teacher is not None and answers_about_rois(teacher)
    detector = teacher.to(device).to(memory_format=torch.channels_last)
    return SoftTeacher(detector, job.distill.roi_budget, view_seed(job), job.data.pad, job.teacher.precision)


def open_cache(job: Job, shards: ShardSet, teacher: Detector) -> Cache:
    """Return the job's cache as it should be, without reading or checking anything yet."""
    assert job.teacher is not None and answers_about_rois(teacher)
    where = job.teacher.cache.path
    folder = shards.folder / "soft_targets" if where is None else Folder.open(where)
    return Cache(folder, recipe_of(job, shards, teacher), shards, views_of(job), codec_of(job, teacher), job.distill.roi_budget)


def codec_of(job: Job, teacher: TwoStageDetector) -> Codec:
    """Return the codec of a cache of this teacher's soft targets."""
    assert job.teacher is not None
    roi = teacher.roi.stages[0].spec
    # A teacher may have fewer classes, background included, than teacher.cache.logits asks for.
    logits = min(job.teacher.cache.logits, teacher.num_classes + 1)
    return Codec(job.teacher.cache.dtype, roi.fcs, roi.fc_channels, logits)


def builder_of(job: Job, shards: ShardSet, teacher: Detector, device: torch.device | str = "cpu") -> Builder:
    """Return the builder that fills the job's cache."""
    assert job.teacher is not None
    cache, soft = open_cache(job, shards, teacher), soft_teacher(job, teacher, device)
    maker = BatchMaker(job.data, view_seed(job), train=True)
    # On a cluster, the CPUs that the pool reserves for a process; without one, those of the machine.
    cpus = min(8, os.cpu_count() or 1) if job.cluster.workers == 0 else int(job.teacher.pool.cpus)
    return Builder(cache, soft, maker, job.teacher.batch_size, threads=max(1, cpus))
