"""Find the batch size that fits into every worker's GPU, with a task on each."""

from __future__ import annotations

from typing import Any

import ray

from headkd_ray.cluster.resources import Resources
from headkd_ray.errors import JobError, UserError
from headkd_ray.job import Job
from headkd_ray.profiling.batch_size import NO_GPU, largest_batch_size


def largest_batch_size_of(job: Job, resources: Resources) -> int:
    """Return the smallest of what ``largest_batch_size`` finds on the GPUs of the job's workers, all at the same time.

    Raises JobError if the workers have no GPUs, and what ``largest_batch_size`` raises.
    """
    if not resources.gpus_per_worker:
        raise JobError(NO_GPU)
    spec = job.cluster
    where: dict[str, Any] = {"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker}
    where |= {"label_selector": spec.labels} if spec.labels else {}
    where |= {"accelerator_type": spec.accelerator_type} if spec.accelerator_type else {}
    # One task for each worker, since GPUs may differ. A task holds its GPU, so that the next one takes another if one is free.
    trial = ray.remote(_largest).options(name=f"{job.run.name}-batch-size", **where)
    found = ray.get([trial.remote(job.model_dump(mode="json"), resources.gpus_per_worker) for _ in range(spec.fewest_workers)])
    for answer in found:
        if isinstance(answer, UserError):
            raise answer
    return min(found)


def _largest(job: dict[str, Any], share: float) -> int | UserError:
    """Return what is found in this process; errors that users can mend are returned, since Ray would wrap them."""
    try:
        return largest_batch_size(Job.model_validate(job), share)
    except UserError as error:
        return error
