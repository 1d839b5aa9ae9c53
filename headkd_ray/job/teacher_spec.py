"""The teacher's keys: which detector, where it runs, and what of it is kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from headkd_ray.job.module_specs import Spec, Text
from headkd_ray.job.numbers import Batch, Logits, Processes, Scale, ShareOrNone


class PoolSpec(Spec):
    """Teacher processes beside the train workers (placement pool; also what builds a cache on a cluster)."""

    actors: tuple[Processes, Processes] = (1, 1)
    """[fewest, most] processes of each train worker; Ray starts more while batches wait for a teacher (with rois: student it
    stays at the fewest). A cache is built by the greatest number."""
    cpus: ShareOrNone = 1.0
    """CPUs that Ray reserves for a process."""
    gpus: ShareOrNone = 0.0
    """GPUs of a process, also parts of one; 0 = on the CPU."""
    resources: dict[str, Scale] = Field(default_factory=dict)
    """Custom Ray resources of a process, for example {teacher: 1} on nodes that are started with such."""


class CacheSpec(Spec):
    """Soft targets on disk (placement cache)."""

    path: Text | None = None
    """Folder or URI of the cache; null = the folder soft_targets in data.train."""
    dtype: Literal["fp16", "int8"] = "fp16"
    """How the features are stored; int8 = 8 bits with a scale per channel."""
    logits: Logits = 0
    """Greatest class logits of each RoI that are kept besides, with their classes; 0 = none. No loss reads them: they are for
    your own code, and verify compares them."""


class TeacherSpec(Spec):
    """The frozen detector that teaches."""

    checkpoint: Text
    """Folder of a headkd_ray student or teacher (model.safetensors + model.json), or an mmdet or torchvision .pth file.
    A relative path starts at the command's current folder."""
    classes: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Class names in the order of the checkpoint's outputs, when the file does not name them; null = read from the file."""
    placement: Literal["inline", "pool", "cache"] = "inline"
    """Where the teacher is: inline = in the train worker; pool = in processes of its own, which with distill.rois: teacher give
    each batch its answers on the way to the worker, and with rois: student hold its features and answer the worker; cache =
    nowhere, its answers are read from disk (python -m headkd_ray.cache build JOB), which needs distill.rois: teacher."""
    batch_size: Batch = 8
    """Views a forward pass of the teacher when it builds a cache."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the teacher's forward passes; bf16 = autocast. (In the train worker with rois: student, optim.precision.)"""
    pool: PoolSpec = PoolSpec()
    """Teacher processes beside the train workers."""
    cache: CacheSpec = CacheSpec()
    """Soft targets on disk."""
