"""A trial, in its own process: the job of its values trained with each seed; what it finds goes into its file first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ray import tune

from headkd_ray.cluster.train import with_absolute_paths
from headkd_ray.engine.cost import inference_cost
from headkd_ray.engine.log import Record, Sink
from headkd_ray.errors import TrainingError, UserError
from headkd_ray.job import Job
from headkd_ray.search.records import SearchFolder, Trial
from headkd_ray.search.space import Search

TIME = "epoch"
"""By what the scheduler counts: epochs of the first seed's training."""
KEPT = ("AP", "AP50", "AP75", "APs", "APm", "APl", "step")

TrainJob = Callable[[Job, Sink], Record]


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a search share; travels to their processes."""

    search: Search
    folder: SearchFolder
    train: TrainJob
    """Trains a job, or resumes it, or tells the result of one that ended."""
    start: str
    """The driver's current folder, at which a job's relative paths start."""

    def job(self, trial: Trial, seed: int) -> Job:
        """One training of a trial. Raises JobError if its values do not go together."""
        name = self.folder.run_name(trial.number, seed)
        return with_absolute_paths(self.search.job(trial.values, name, self.folder.runs.address, seed), self.start)


def run_trial(config: dict[str, Any], context: TrialContext) -> None:
    """Ray Tune's function: train, report the first seed's evaluations as they come, and the mean over seeds at the end.

    A failure of the trial's own is written into its file, and Tune sees a trial that ended without a result; only a process
    that dies is tried again.
    """
    trial = context.folder.trial(config["number"])
    if trial.state == "running":  # else this process died between writing and reporting
        try:
            trial = _trained(trial, context)
        except Exception as error:
            trial = trial.with_end("failed", cause=_cause(error), curve=_curve(trial, context))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # other trials may share the GPU
        context.folder.write(trial)
    if trial.state == "finished":
        metric = context.search.spec.objective.metric
        tune.report({TIME: context.job(trial, context.search.seeds[0]).optim.epochs, metric: trial.mean(metric)})


def _trained(trial: Trial, context: TrialContext) -> Trial:
    search = context.search
    first, *_ = search.seeds
    results: dict[str, dict[str, Any]] = {}
    cost = inference_cost(context.job(trial, first)) if search.spec.objective.cost is not None else {}
    for seed in search.seeds:
        job = context.job(trial, seed)
        report = _Report(job, search.spec.objective.metric)
        if seed == first:
            for epoch, value in _curve(trial, context):  # of an earlier start: the scheduler may be new
                report.evaluation(epoch, value)
        result = context.train(job, report if seed == first else _quiet)
        results[str(seed)] = {**{name: result["best"][name] for name in KEPT}, "student": result["student"]}
    ended = trial.with_end("finished", results=results, cost=cost, curve=_curve(trial, context))
    if math.isnan(ended.mean(search.spec.objective.metric)):
        raise TrainingError(f"{search.spec.objective.metric} cannot be computed on {search.base.data.val}")
    return ended


def _curve(trial: Trial, context: TrialContext) -> list[tuple[float, float | None]]:
    return context.folder.curve(trial.number, context.search.seeds[0], context.search.spec.objective.metric)


class _Report:
    """Takes a training's log records; tells the scheduler of its evaluations but the last, which is told with the result.

    The value is the best so far, for a run's result is its best checkpoint.
    """

    def __init__(self, job: Job, metric: str) -> None:
        self.epochs, self.metric = job.optim.epochs, metric
        self.best = -math.inf
        self.told = 0.0

    def __call__(self, record: Record) -> None:
        if "val" in record:
            self.evaluation(record["epoch"], record["val"][self.metric])

    def evaluation(self, epoch: float, value: float | None) -> None:
        """One evaluation; those that a resumed training repeats are left out."""
        if value is None or epoch >= self.epochs or epoch <= self.told:
            return
        self.best, self.told = max(self.best, value), epoch
        tune.report({TIME: int(epoch), self.metric: self.best})


def _quiet(record: Record) -> None:
    """For the seeds after the first."""


def _cause(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {error}"
    return f"{type(error).__name__}: {error}"
