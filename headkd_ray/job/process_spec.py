"""Define the keys of a process that Ray places beside the train workers: what it reserves, and where it may run."""

from __future__ import annotations

from pydantic import Field

from headkd_ray.job.module_specs import Labels, Spec, Text
from headkd_ray.job.numbers import Scale, ShareOrNone


class ProcessSpec(Spec):
    """What Ray reserves for a process, and the nodes on which it may run."""

    cpus: ShareOrNone = 1.0
    """CPUs that Ray reserves per process."""
    gpus: ShareOrNone = 0.0
    """GPUs per process, possibly a fraction of one; 0 = run on the CPU."""
    resources: dict[str, Scale] = Field(default_factory=dict)
    """Custom Ray resources per process, for example {teacher: 1} on nodes that were started with them."""
    labels: Labels = Field(default_factory=dict)
    """Labels that the nodes of these processes must have, as in cluster.labels."""
    accelerator_type: Text | None = None
    """Kind of GPU that these processes need, as in cluster.accelerator_type; null = any."""
