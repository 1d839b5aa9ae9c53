"""Find the batch size that fits into every worker's GPU, with a task on each."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayTaskError

from headkd_ray.cluster.resources import Resources, resources_of_worker
from headkd_ray.errors import JobError, UserError
from headkd_ray.job import Job
from headkd_ray.profiling.batch_size import NO_GPU, largest_batch_size


def largest_batch_size_of(job: Job, resources: Resources) -> int:
    """Return the smallest of what ``largest_batch_size`` finds on the GPUs of the job's workers, all at the same time.

    Raises JobError if the workers have no GPUs, and what ``largest_batch_size`` raises.
    """
    if not resources.gpus_per_worker:
        raise JobError(NO_GPU)
    # One task for each worker, since GPUs may differ. A task holds its GPU, so that the next one takes another if one is free.
    trial = ray.remote(_largest).options(name=f"{job.run.name}-batch-size", **resources_of_worker(job.cluster, resources))
    calls = [trial.remote(job.model_dump(mode="json"), resources.gpus_per_worker) for _ in range(job.cluster.fewest_workers)]
    try:
        return min(ray.get(calls))
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None


def _largest(job: dict[str, Any], share: float) -> int:
    return largest_batch_size(Job.model_validate(job), share)
