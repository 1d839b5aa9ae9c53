"""A trial in its own process: train the trial's job with each seed, and write the result to its file before reporting it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune

from headkd_ray.cluster.trainer import with_absolute_paths
from headkd_ray.deploy.onnx_latency import onnx_latency
from headkd_ray.engine.log import Record, Sink
from headkd_ray.engine.scratch import Scratch
from headkd_ray.errors import StoppedError, TrainingError, UserError
from headkd_ray.job import Job
from headkd_ray.profiling.inference_cost import inference_cost
from headkd_ray.tuning.on_ray.population import copied, member, plant, save_for_others
from headkd_ray.tuning.space import Search
from headkd_ray.tuning.trial_records import SearchFolder, Trial

TIME = "epoch"
"""The scheduler's unit of time: epochs of training with the first seed."""
KEPT = ("AP", "AP50", "AP75", "APs", "APm", "APl", "step")

TrainJob = Callable[[Job, Sink], Record]


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a search share; it is sent to their processes."""

    search: Search
    folder: SearchFolder
    train: TrainJob
    """Function that trains or resumes a job, or returns its result if it has ended."""
    start: str
    """The driver's current folder, against which a job's relative paths are resolved."""
    population: list[int] | None
    """pbt: numbers of the trials, in Tune's order."""

    def job(self, trial: Trial, seed: int) -> Job:
        """Return the job of one training of a trial. Raises JobError if its values are incompatible."""
        name = self.folder.run_name(trial, seed)
        return with_absolute_paths(self.search.job(trial.values, name, self.folder.runs.address, seed), self.start)

    def curve(self, trial: Trial) -> list[tuple[float, float | None]]:
        """Return the learning curve with the first seed so far."""
        return self.folder.curve(trial, self.search.seeds[0], self.search.spec.objective.metric)


def run_trial(config: dict[str, Any], context: TrialContext) -> None:
    """Train a trial, report the first seed's evaluations as they come, and finally the mean over seeds. Called by Ray Tune.

    If the trial itself fails, this is written to its file and Tune sees a trial that ended without a result; Tune only retries
    a trial whose process died.
    """
    grown = context.population is not None
    trial_id = tune.get_context().get_trial_id()
    number = config["number"] if context.population is None else member(trial_id, context.population)
    trial = context.folder.trial(number)
    if trial.state == "running":  # else this process died between writing and reporting
        try:
            if grown:
                trial = _with_copy(trial, config["values"], context)
            trial = _trained(trial, context)
        except StoppedError:
            raise  # its machine is being taken away: another one will continue it
        except Exception as error:
            trial = trial.with_end("failed", cause=_cause(error), curve=context.curve(trial))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # other trials may share the GPU
        context.folder.write(trial)
    if trial.state == "finished" and not grown:  # after a report, a population's scheduler might make it copy another trial
        metric = context.search.spec.objective.metric
        tune.report({TIME: context.job(trial, context.search.seeds[0]).optim.epochs, metric: trial.mean(metric)})


def _with_copy(trial: Trial, values: dict[str, Any], context: TrialContext) -> Trial:
    """Carry out the copy that the scheduler has decided on, if any, and return the resulting trial."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return trial
    with checkpoint.as_directory() as name:
        changed = copied(trial, values, Path(name))
        if changed is None:
            return trial
        trial, origin = changed
        plant(context.job(trial, context.search.seeds[0]), Path(name), origin, context.folder)
    context.folder.write(trial)
    return trial


def _trained(trial: Trial, context: TrialContext) -> Trial:
    search = context.search
    first, *_ = search.seeds
    results: dict[str, dict[str, Any]] = {}
    wanted = search.spec.objective.cost
    cost = inference_cost(context.job(trial, first)) if wanted is not None else {}
    for seed in search.seeds:
        job = context.job(trial, seed)
        result = context.train(job, _report(trial, job, context) if seed == first else _quiet)
        results[str(seed)] = {**{name: result["best"][name] for name in KEPT}, "student": result["student"]}
    if wanted == "onnx_latency":
        cost[wanted] = onnx_latency(results[str(first)]["student"], context.job(trial, first).data.val)
    ended = trial.with_end("finished", results=results, cost=cost, curve=context.curve(trial))
    if math.isnan(ended.mean(search.spec.objective.metric)):
        raise TrainingError(f"{search.spec.objective.metric} cannot be computed on {search.base.data.val}")
    return ended


def _report(trial: Trial, job: Job, context: TrialContext) -> Sink:
    metric = context.search.spec.objective.metric
    if context.population is not None:
        return PopulationReport(trial, job, metric)
    report = Report(job, metric)
    for epoch, value in context.curve(trial):  # of an earlier process, perhaps unknown to the scheduler
        report.evaluation(epoch, value)
    return report


class Report:
    """A sink that reports a training's evaluations to the scheduler, except the last, which is reported with the result.

    The reported value is the best so far, because a run's result is its best checkpoint.
    """

    def __init__(self, job: Job, metric: str) -> None:
        self.epochs, self.metric = job.optim.epochs, metric
        self.best = -math.inf
        self.told = 0.0

    def __call__(self, record: Record) -> None:
        if "val" in record:
            self.evaluation(record["epoch"], record["val"][self.metric])

    def evaluation(self, epoch: float, value: float | None) -> None:
        """Report an evaluation, unless a resumed training repeats it."""
        if value is None or epoch >= self.epochs or epoch <= self.told:
            return
        self.best, self.told = max(self.best, value), epoch
        tune.report({TIME: int(epoch), self.metric: self.best})


class PopulationReport:
    """A sink that reports a population member's evaluations with their checkpoints.

    An evaluation is reported when the next record comes, since its checkpoint exists by then.
    """

    def __init__(self, trial: Trial, job: Job, metric: str) -> None:
        self.trial, self.job, self.metric = trial, job, metric
        self.waiting: Record | None = None
        self.scratch = Scratch()

    def __call__(self, record: Record) -> None:
        told, self.waiting = self.waiting, record if "val" in record else None
        if told is None or told["val"][self.metric] is None:
            return
        folder = self.scratch.folder()
        try:
            save_for_others(self.trial, self.job, told, folder)
            tune.report(
                {TIME: int(told["epoch"]), self.metric: told["val"][self.metric]},
                checkpoint=tune.Checkpoint.from_directory(folder),
            )
        finally:
            shutil.rmtree(folder)


def _quiet(record: Record) -> None:
    """Discard a record: only the first seed's training reports to the scheduler."""


def _cause(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {error}"
    return f"{type(error).__name__}: {error}"
