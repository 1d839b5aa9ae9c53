"""Check that a train worker sees the driver's files: another node may have other ones under the same path, or none."""

from __future__ import annotations

import time
from pathlib import Path

from headkd_ray.engine.run import JOB_FILE, run_folder
from headkd_ray.errors import ClusterError
from headkd_ray.job import Job
from headkd_ray.storage import Folder

PATIENCE = 60.0
"""Seconds that a network file system may take to show a folder that another node has just made."""


def check_shared(job: Job, node: str, patience: float = PATIENCE) -> None:
    """Check that this node, which is called ``node``, has the run's folder and the data; the job's paths are absolute.

    Otherwise the worker would train up to its first checkpoint, which Ray Train would then find in the wrong place.

    Raises:
        ClusterError: it has not, and names each key with its path.
    """
    deadline = time.monotonic() + patience
    while (lacking := _lacking(job)) and time.monotonic() < deadline:
        time.sleep(1)
    if lacking:
        mend = "on several nodes, use a bucket (s3://...) or a disk that all of them mount under this path"
        raise ClusterError(
            [f"{key}: the node {node} does not see the command's folder {path}; {mend}" for key, path in lacking]
        )


def _lacking(job: Job) -> list[tuple[str, str]]:
    run = run_folder(job)
    lacking = [] if run.remote or run.has(JOB_FILE) else [("run.storage", run.uri)]
    data = {"data.train": job.data.train, "data.val": job.data.val, "data.unlabelled": job.data.unlabelled}
    places = {key: Folder.open(place) for key, place in data.items() if place is not None}
    return lacking + [(key, place.uri) for key, place in places.items() if not place.remote and not Path(place.path).exists()]
