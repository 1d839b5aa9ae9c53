"""Evaluate a run's students in a Ray task, while its workers train on (``eval.placement: task``).

Ray Train has a mechanism of its own for this, ``ValidationConfig`` (alpha), which is not used (Ray 2.60,
``ray/train/v2/_internal/execution/checkpoint/validation_manager.py``): if an evaluation raises, it only writes that into the
controller's log, and the run ends without its metrics; the controller waits for running evaluations before it ends, also after
a worker was lost or a node is drained, so that each of our restarts would wait; and its result reaches neither the training
process, which keeps the log, nor the checkpoint's files, with which the student is exported.
"""

from __future__ import annotations

import ray
import torch
from ray.exceptions import RayTaskError

from headkd_ray.cluster.resources import options_of
from headkd_ray.engine.coco_metrics import CocoMetrics
from headkd_ray.engine.evaluation_queue import Pending, Request, evaluate_waiting
from headkd_ray.errors import UserError


def start_evaluation(request: Request) -> Pending:
    """Start an evaluation in a Ray task with the resources of ``eval.task``; Ray repeats it if its process or node is lost."""
    name, options = f"{request.job.run.name}-evaluation-{request.step}", options_of(request.job.eval.task)
    call = ray.remote(_evaluate).options(name=name, **options).remote(request)

    def metrics() -> CocoMetrics | None:
        if not ray.wait([call], timeout=0)[0]:
            return None
        try:
            scored: CocoMetrics = ray.get(call)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        return scored

    return metrics


def _evaluate(request: Request) -> CocoMetrics:
    task = request.job.eval.task
    torch.set_num_threads(max(1, int(task.cpus)))
    return evaluate_waiting(request, torch.device("cuda" if task.gpus else "cpu"))
