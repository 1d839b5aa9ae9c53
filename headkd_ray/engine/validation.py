"""Evaluation of a job's student on the validation split."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from headkd_ray.detectors import Detector
from headkd_ray.engine.coco_metrics import CocoMetrics
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.evaluation import evaluate
from headkd_ray.engine.streams import Streams
from headkd_ray.job import Job
from headkd_ray.memory import enough_memory


def validate(
    job: Job,
    distributed: Distributed,
    streams: Streams,
    student: Detector,
    keep: Callable[[CocoMetrics, list[dict[str, Any]]], None] = lambda metrics, results: None,
    interrupted: Callable[[], bool] = lambda: False,
    shares: int | None = None,
) -> CocoMetrics:
    """Compute COCO metrics on the validation split, and return them on every rank.

    Args:
        keep, interrupted: as in ``evaluate``, which also says what is raised.
        shares: as in ``Streams.val``.
    """
    distributed.share_buffers(student)  # rank 0's student is exported, so evaluate that one
    truth = streams.val_set.ground_truth() if distributed.rank == 0 else None
    smaller = f"lower eval.batch_size ({job.eval.batch_size}), data.eval_short_side or data.long_side"
    # What is evaluated is the student as it is exported, and no graphs are made for the sizes of evaluation.
    as_exported = torch.compiler.set_stance("force_eager") if job.optim.compile is not None else nullcontext()
    with as_exported, enough_memory(f"run {job.run.name}, evaluation", smaller), streams.val(shares) as batches:
        return evaluate(student, batches, distributed, truth, streams.scoring, job.optim.precision, keep, interrupted)
