"""Run a search on Ray Tune, which places, stops and restarts trials.

The trials' values and results are in the search's own files, from which it can be resumed even on another cluster or with
another version of Ray; Tune's files are temporary.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from headkd_ray.cluster.connect import connected
from headkd_ray.cluster.data_actors import keep_data_actors_here
from headkd_ray.cluster.resources import gpus_of_process, has_pool, room_for
from headkd_ray.errors import ClusterError
from headkd_ray.job import Job
from headkd_ray.text import warn
from headkd_ray.tuning.on_ray.population import member, population_scheduler
from headkd_ray.tuning.on_ray.trial import TIME, TrainJob, TrialContext, run_trial
from headkd_ray.tuning.space import Search, Values
from headkd_ray.tuning.study import propose
from headkd_ray.tuning.trial_records import SearchFolder, Trial

OF_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files: a trial's run folder has its own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command at once; --resume continues
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # its snapshots are not used
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints even with verbose=0
}
"""Environment variables of the process that runs Tune's driver."""

Event = dict[str, Any]
"""An event of a search: the ``trial`` and, if it was evaluated, ``epoch`` and ``value``."""


def search_on_ray(
    search: Search, folder: SearchFolder, train: TrainJob, tell: Callable[[Event], None], earlier: Sequence[Trial] = ()
) -> list[Trial]:
    """Run the search, or what is left of it, and return all its trials.

    Args:
        folder: the search's folder, started (``SearchFolder.start``); trials in it that have ended are not run again.
        train: trains one job in a trial's process.
        tell: receives the events in this process.
        earlier: trials of an earlier search from which values are learnt, too (``warm_start.earlier_trials``).

    Raises:
        ClusterError: the cluster is missing, or too small for one trial.
    """
    os.environ.update({name: value for name, value in OF_TUNE.items() if name not in os.environ})
    base = search.base
    with connected(base.cluster, dashboard=base.cluster.workers != 0):
        room = room_for(base)
        if not room:
            raise ClusterError(
                f"no node has room for a trial: {_trial_resources(base)}; lower cluster.cpus_per_worker or gpus_per_worker"
            )
        concurrent = min(room, search.spec.budget.max_concurrent or room)
        state = SearchState(search, folder, tell, earlier)
        if state.complete:
            return list(state.trials.values())
        if base.cluster.workers != 0:
            keep_data_actors_here(pool=has_pool(base))
        context = TrialContext(search, folder, train, os.getcwd(), state.population)
        scratch = folder.folder / "tune"
        scratch.remove()
        seconds = None if search.spec.budget.minutes is None else 60 * search.spec.budget.minutes
        state.deadline = None if seconds is None else time.monotonic() + seconds
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, context=context), _trial_resources(base)),
            param_space=_population_space(state),
            tune_config=tune.TuneConfig(
                search_alg=Proposer(state) if state.population is None else None,
                scheduler=_scheduler(search, state),
                num_samples=-1 if state.population is None else 1,  # the proposer decides when to stop
                max_concurrent_trials=concurrent,
                time_budget_s=seconds,
                reuse_actors=base.cluster.workers == 0,  # imports torch once; but Train workers end only with the actor
            ),
            run_config=tune.RunConfig(
                name=uuid.uuid4().hex[:8],
                storage_path=scratch.path,
                storage_filesystem=scratch.fs,
                failure_config=tune.FailureConfig(max_failures=search.spec.budget.max_failures),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=3),  # only pbt has any, and copies the latest
                callbacks=[Recorder(state)],
                verbose=0,
            ),
        )
        # It would warn about the missing files of the loggers that are disabled above.
        logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
        tuner.fit()
        scratch.remove()
    return folder.trials(search, lambda text: None)  # SearchState has already warned


class SearchState:
    """The driver's view of the trials: the content of their files, which are read once."""

    def __init__(
        self, search: Search, folder: SearchFolder, tell: Callable[[Event], None], earlier: Sequence[Trial] = ()
    ) -> None:
        self.search, self.folder, self.tell, self.earlier = search, folder, tell, earlier
        self.trials = {trial.number: trial for trial in folder.trials(search, warn)}
        self.number_of_next = max(folder.numbers(), default=-1) + 1  # a trial that was left out keeps its number
        self.waiting = [number for number, trial in self.trials.items() if trial.state == "running"]
        self.deadline: float | None = None
        """Time at which Tune stops everything, in ``time.monotonic`` seconds."""

        self.population: list[int] | None = None
        """pbt: numbers of the trials, in Tune's order."""
        if search.spec.scheduler.kind == "pbt":
            self.population = []
            while (trial := self.following()) is not None:
                self.population.append(trial.number)
                tell({"trial": trial})

    def number(self, trial: Any) -> int:
        """Return the number of a Tune trial."""
        return trial.config["number"] if self.population is None else member(trial.trial_id, self.population)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks into files that are not used, and a terminal cannot be pickled

    @property
    def complete(self) -> bool:
        """Whether nothing is left to run."""
        if self.population is not None:
            return not self.population
        return not self.waiting and self._proposed() is None

    def _proposed(self) -> Values | None:
        limit = self.search.spec.budget.trials
        if limit is not None and len(self.trials) >= limit:
            return None
        return propose(self.search, list(self.trials.values()), self.number_of_next, self.earlier)

    def following(self) -> Trial | None:
        """Return the next trial: an unfinished one, else a new one, whose file is written; None if there are no more."""
        if self.waiting:
            return self.trials[self.waiting.pop(0)]
        number, values = self.number_of_next, self._proposed()
        if values is None:
            return None
        self.number_of_next += 1
        self.trials[number] = trial = Trial(number, values, started=time.time())
        self.folder.write(trial)
        return trial

    def ended(self, number: int, **changes: Any) -> None:
        """Record that a trial ended: as its file says, or with ``changes`` if its process could not write its end."""
        trial = self.folder.trial(number)
        if trial.state == "running":
            if self.deadline is not None and time.monotonic() >= self.deadline:
                return  # out of time: --resume continues it
            curve = self.folder.curve(trial, self.search.seeds[0], self.search.spec.objective.metric)
            trial = trial.with_end(curve=curve, **changes)
            self.folder.write(trial)
        self.trials[number] = trial
        self.tell({"trial": trial})


class Proposer(Searcher):
    """A Tune searcher that proposes the trials of a search."""

    def __init__(self, state: SearchState) -> None:
        super().__init__()
        self.state = state

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the next trial's config."""
        trial = self.state.following()
        if trial is None:
            return Searcher.FINISHED
        self.state.tell({"trial": trial})
        return {"number": trial.number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: the Recorder handles it."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the search's files hold the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the search's files hold the state."""


class Recorder(tune.Callback):
    """A Tune callback that records how trials end and reports events."""

    def __init__(self, state: SearchState) -> None:
        self.state = state

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Report an evaluation."""
        number = self.state.number(trial)
        known = self.state.trials[number]
        if self.state.population is not None:  # it may have copied another
            known = self.state.trials[number] = self.state.folder.trial(number)
        metric = self.state.search.spec.objective.metric
        self.state.tell({"trial": known, "epoch": result[TIME], "value": result[metric]})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial ended or that the scheduler stopped it."""
        self.state.ended(self.state.number(trial), state="stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a failure: the trial's process died too often."""
        lines = str(trial.get_error() or "unknown").strip().splitlines()
        self.state.ended(self.state.number(trial), state="failed", cause=f"its process died: {lines[-1]}")


class Halving(ASHAScheduler):
    """Successive halving that ranks trial 0 with the others but never stops it, since it is their baseline."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether the trial continues."""
        action = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if trial.config.get("number") == 0 else action


def _population_space(state: SearchState) -> dict[str, Any]:
    """Return pbt's initial values as Tune's parameter space, because its population scheduler does not accept a searcher."""
    if state.population is None:
        return {}
    return {"values": tune.grid_search([state.trials[number].values for number in state.population])}


def _trial_resources(job: Job) -> tune.PlacementGroupFactory:
    """Return the resources of a trial's own process.

    With train workers, which reserve their own, it is only their small driver. That runs on the head node, which is not a spot
    machine, and without a CPU, because decoding needs whole ones.
    """
    if job.cluster.workers != 0:
        return tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
    gpus = gpus_of_process(job)
    return tune.PlacementGroupFactory([{"CPU": job.cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})}])


def _scheduler(search: Search, state: SearchState) -> TrialScheduler:
    spec = search.spec.scheduler
    if spec.kind == "none":
        return FIFOScheduler()
    if spec.kind == "pbt":
        return population_scheduler(search, TIME)
    metric = search.spec.objective.metric
    epochs = search.spec.space.get("optim.epochs")
    longest = max(epochs.ends) if epochs is not None else search.base.optim.epochs
    scheduler = Halving(
        time_attr=TIME,
        metric=metric,
        mode="max",
        max_t=longest,
        grace_period=min(spec.grace_epochs, longest),
        reduction_factor=spec.reduction,
    )
    for trial in state.trials.values():  # a resumed search also compares with trials that ended before
        if trial.state in ("finished", "stopped"):
            stand_in, best = TuneTrial("headkd", stub=True), -float("inf")
            scheduler.on_trial_add(None, stand_in)
            for epoch, value in trial.curve:
                if value is not None:
                    best = max(best, value)
                    scheduler.on_trial_result(None, stand_in, {TIME: int(epoch), metric: best})
    return scheduler
