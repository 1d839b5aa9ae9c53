"""Every key of a search file (``jobs/tune_*.yaml``) with its type, unit, default and meaning (the field's docstring)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from headkd_ray.job.module_specs import Spec, Text
from headkd_ray.job.numbers import (
    Epochs,
    Fraction,
    Number,
    PositiveNumber,
    PositiveWhole,
    Processes,
    Restarts,
    Seconds,
    Seed,
    Trials,
    TrialsOrNone,
    Whole,
)


class SearchRunSpec(Spec):
    """What the search is called and where it writes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Name of the search: its folder under storage. Letters, digits, dot, dash and underscore, a letter or digit first."""
    storage: Text = "runs"
    """Folder or URI (file, s3, gs, hdfs) under which the search writes; all machines of the cluster must reach it.
    A relative path starts at the command's current folder."""
    seed: Seed = 0
    """Seeds the choice of values; the training's own seeds are ``seeds``."""


class ParameterSpec(Spec):
    """The values that a job key may take: exactly one of uniform, loguniform, randint, lograndint and choice."""

    uniform: tuple[Number, Number] | None = None
    """[lowest, highest]: a number, uniform between them; with step, one of lowest, lowest + step, ..."""
    loguniform: tuple[PositiveNumber, PositiveNumber] | None = None
    """[lowest, highest]: a number whose logarithm is uniform."""
    randint: tuple[Whole, Whole] | None = None
    """[lowest, highest]: a whole number, uniform, both ends included; with step, one of lowest, lowest + step, ..."""
    lograndint: tuple[PositiveWhole, PositiveWhole] | None = None
    """[lowest, highest]: a whole number whose logarithm is uniform, both ends included."""
    choice: Annotated[tuple[Any, ...], Field(min_length=1, max_length=1000)] | None = None
    """One of these values, of any type."""
    step: PositiveNumber | None = None
    """Distance of neighbouring values (uniform, randint); null = any value, or any whole number."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Vary the key only in trials in which each of these job keys has the given value, or one of a list of values; in the
    others it is as in the base job."""

    @property
    def kind(self) -> str:
        """Which of the five it is."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def ends(self) -> list[Any]:
        """The values to check before a search starts: both ends of a range, every choice."""
        return list(getattr(self, self.kind))


KINDS = ("uniform", "loguniform", "randint", "lograndint", "choice")


class SearcherSpec(Spec):
    """Which values a trial gets."""

    kind: Literal["random", "grid", "tpe"] = "tpe"
    """random; grid = every combination of choices, whole numbers and steps, in turn; tpe = Optuna's multivariate
    tree-structured Parzen estimator, which learns from the trials that ended, for one objective or two."""
    startup_trials: TrialsOrNone = 10
    """tpe: trials that end before it learns; until then values are random."""


class SchedulerSpec(Spec):
    """Which trials go on after an evaluation on data.val."""

    kind: Literal["none", "asha", "pbt"] = "none"
    """none = all; asha = asynchronous successive halving: of the trials that reached a rung (grace_epochs, times reduction,
    ...), the best 1 / reduction, and trial 0 always; pbt = population-based training: at every perturb_epochs the worst copy
    the state and the values of the best and change the values a little, so that values become schedules. pbt needs
    cluster.workers: 0 and keys that do not shape the models; its trial 0 only begins as the base job."""
    grace_epochs: Epochs = 1
    """asha: epochs that every trial is trained for."""
    reduction: Annotated[int, Field(ge=2, le=1000)] = 3
    """asha: share that goes on, as 1 / reduction."""
    perturb_epochs: Epochs = 1
    """pbt: epochs between exploits; checkpoints are made and evaluated then."""
    quantile: Annotated[float, Field(gt=0.0, le=0.5)] = 0.25
    """pbt: share of the trials that copy, and share that is copied."""
    resample: Fraction = 0.25
    """pbt: probability that a value is drawn anew instead of multiplied by 0.8 or 1.2 (a choice: moved to a neighbour)."""


class BudgetSpec(Spec):
    """When the search ends, and how much it takes at a time."""

    trials: Trials | None = None
    """Trials, the base job's own values (trial 0) included; null = as many as a grid has, or as minutes allow."""
    minutes: Seconds | None = None
    """Time after which the command stops, trials that run included; ``--resume`` goes on with them. null = no limit."""
    max_concurrent: Processes | None = None
    """Trials at a time; null = as many as fit the cluster. With cluster.gpus_per_worker below 1 several share a GPU."""
    max_failures: Restarts = 2
    """How often a trial whose process or machine died is started again, from its last checkpoint. A trial that failed by itself
    (loss not finite, out of memory, a bad job) is recorded and not tried again."""


class ObjectiveSpec(Spec):
    """What is sought."""

    metric: Literal["AP", "AP50", "AP75", "APs", "APm", "APl"] = "AP"
    """COCO metric on data.val, of a run's best checkpoint by AP, in percent; the mean over ``seeds``."""
    cost: Literal["params", "flops", "latency"] | None = None
    """What the student shall cost little of, as the second objective: params (million), flops (10^9 of a forward pass at
    evaluation size, a multiply-add is two), latency (ms of that pass, measured in the trial's process). The search then finds a
    Pareto front. It only makes sense if the space has student keys. null = the metric alone."""


class SearchSpec(Spec):
    """One search."""

    run: SearchRunSpec
    """What the search is called and where it writes."""
    job: Text
    """The base job file. A relative path starts at the command's current folder. Trial 0 has its values."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Job keys (``optim.epochs``) that are other than in the base job in all trials."""
    space: dict[str, ParameterSpec]
    """Job keys that are searched, each with the values that it may take."""
    objective: ObjectiveSpec = ObjectiveSpec()
    """What is sought."""
    searcher: SearcherSpec = SearcherSpec()
    """Which values a trial gets."""
    scheduler: SchedulerSpec = SchedulerSpec()
    """Which trials go on after an evaluation."""
    budget: BudgetSpec = BudgetSpec()
    """When the search ends, and how much it takes at a time."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000)] | None = None
    """Values of run.seed that each trial is trained with, one after the other, for their mean; the scheduler judges by the
    first, and only who survives is trained with the others. null = the base job's one."""
