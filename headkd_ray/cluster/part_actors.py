"""Make the parts of a prediction with Ray Data: actors that hold the detector and take one part after another.

A row of the Dataset is a part's number, so what passes through Ray is small however large the images are: an actor reads the
images of a part ahead of its network, and writes the part itself. A lost actor is restarted, and gets its part again.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext

from headkd_ray.cluster.connect import connected
from headkd_ray.cluster.resources import check_predictors
from headkd_ray.deploy.predictor import load
from headkd_ray.errors import ClusterError, UserError
from headkd_ray.job import ClusterSpec
from headkd_ray.predicting.part_maker import PartMaker
from headkd_ray.predicting.part_plan import Plan
from headkd_ray.storage import Folder

MOST_BLOCKS = 10_000
"""Blocks of the Dataset, each of which is a task; with more parts, a task makes several."""

Columns = dict[str, Any]


@dataclass(frozen=True)
class PartJob:
    """What an actor needs to know to make parts."""

    plan: Plan
    out: str
    """Folder (an absolute path) or URI."""
    batch_size: int
    cpus: float
    gpus: float


class MakeParts:
    """A Ray Data actor that makes the parts of its batches. A UserError is passed on as a value, pickled."""

    def __init__(self, job: PartJob) -> None:
        threads = max(1, int(job.cpus))
        torch.set_num_threads(threads)
        predictor = load(job.plan.checkpoint, "cuda" if job.gpus else "cpu")
        self.maker = PartMaker(predictor, job.plan, Folder.open(job.out), job.batch_size, threads)

    def __call__(self, batch: Columns) -> Columns:
        images, errors = [], []
        for number in batch["part"].tolist():
            try:
                images.append(self.maker.make(number))
                errors.append(b"")
            except UserError as error:
                images.append(0)
                errors.append(pickle.dumps(error))
        return {"images": np.array(images), "error": np.array(errors, dtype=object)}


def make_on_ray(spec: ClusterSpec, plan: Plan, out: str, batch_size: int, parts: Sequence[int]) -> Iterator[int]:
    """Make ``parts`` with ``spec.workers`` processes, and yield the number of images of each finished part, in any order.

    Raises:
        ClusterError: the processes do not fit the cluster, or die.
        UserError: what a process could not go on with.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells what it does
    with connected(spec):
        gpus = check_predictors(spec)
        job = PartJob(plan, out, batch_size, spec.cpus_per_worker, gpus)
        try:
            for bundle in _dataset(spec, job, parts).iter_internal_ref_bundles():
                for block in bundle.block_refs:
                    yield from _images(ray.get(block))
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"the processes cannot go on ({str(error).strip().splitlines()[-1]}); the same command goes on with the parts "
                "that are missing"
            ) from error


def _dataset(spec: ClusterSpec, job: PartJob, parts: Sequence[int]) -> ray.data.Dataset:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with DataContext.current(context):
        rows = [{"part": number} for number in parts]
        return ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS)).map_batches(
            MakeParts,
            fn_constructor_kwargs={"job": job},
            batch_size=1,
            compute=ActorPoolStrategy(size=min(spec.fewest_workers, len(parts)), max_tasks_in_flight_per_actor=2),
            num_cpus=job.cpus,
            num_gpus=job.gpus,
        )


def _images(block: Any) -> Iterator[int]:
    for images, error in zip(block["images"].to_pylist(), block["error"].to_pylist(), strict=True):
        if error:
            raise pickle.loads(error)
        yield images
