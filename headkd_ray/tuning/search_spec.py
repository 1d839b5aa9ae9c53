"""All keys of a search file (``jobs/tune_*.yaml``), with their types, units, defaults and meanings (the field's docstring)."""

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
    """Name, storage and seed of the search."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Name of the search and of its folder under storage. Letters, digits, dots, dashes and underscores, starting with a letter
    or digit."""
    storage: Text = "runs"
    """Folder or URI (file, s3, gs, hdfs) under which the search writes; all machines of the cluster must be able to reach it.
    Relative paths are resolved against the command's current folder."""
    seed: Seed = 0
    """Random seed for choosing values; the seeds of training are in ``seeds``."""


class ParameterSpec(Spec):
    """The values that a job key may take: exactly one of uniform, loguniform, randint, lograndint and choice."""

    uniform: tuple[Number, Number] | None = None
    """[lowest, highest]: a number, uniformly distributed; with step, one of lowest, lowest + step, ..."""
    loguniform: tuple[PositiveNumber, PositiveNumber] | None = None
    """[lowest, highest]: a number whose logarithm is uniformly distributed."""
    randint: tuple[Whole, Whole] | None = None
    """[lowest, highest]: a whole number, uniformly distributed, both ends included; with step, one of lowest, lowest + step,
    ..."""
    lograndint: tuple[PositiveWhole, PositiveWhole] | None = None
    """[lowest, highest]: a whole number whose logarithm is uniformly distributed, both ends included."""
    choice: Annotated[tuple[Any, ...], Field(min_length=1, max_length=1000)] | None = None
    """One of these values, of any type."""
    step: PositiveNumber | None = None
    """Distance between neighbouring values (uniform, randint); null = any value, or any whole number."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Vary the key only in trials in which each of these job keys has the given value, or one of a list of values; other
    trials use the base job's value."""

    @property
    def kind(self) -> str:
        """The one of the five kinds that is given."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def ends(self) -> list[Any]:
        """The values to check before a search starts: both ends of a range, or every choice."""
        return list(getattr(self, self.kind))


KINDS = ("uniform", "loguniform", "randint", "lograndint", "choice")


class SearcherSpec(Spec):
    """How the values of a trial are chosen."""

    kind: Literal["random", "grid", "tpe"] = "tpe"
    """random; grid = every combination of choices, whole numbers and steps, in turn; tpe = Optuna's multivariate
    tree-structured Parzen estimator, which learns from the trials that have ended, for one objective or two."""
    startup_trials: TrialsOrNone = 10
    """tpe: number of trials that must end before it is used; until then values are random."""
    warm_start: Text | None = None
    """tpe: folder or URI of an earlier search with the same objective, whose ended trials it learns from besides its own, and
    which count for startup_trials. Those whose values lie outside this space are left out. null = none."""


class SchedulerSpec(Spec):
    """Which trials continue after an evaluation on data.val."""

    kind: Literal["none", "asha", "pbt"] = "none"
    """none = all continue; asha = asynchronous successive halving: of the trials that reach a rung (grace_epochs, times
    reduction, ...), the best 1 / reduction continue, and trial 0 always does; pbt = population-based training: every
    perturb_epochs the worst trials copy the state and the values of the best and change the values a little, so that values
    become schedules. pbt needs cluster.workers: 0 and keys that do not change the shape of the models; its trial 0 has the base
    job's values only at the start."""
    grace_epochs: Epochs = 1
    """asha: number of epochs for which every trial is trained."""
    reduction: Annotated[int, Field(ge=2, le=1000)] = 3
    """asha: the best 1 / reduction of the trials continue."""
    perturb_epochs: Epochs = 1
    """pbt: number of epochs between copies; checkpoints are written and evaluated then."""
    quantile: Annotated[float, Field(gt=0.0, le=0.5)] = 0.25
    """pbt: fraction of the trials that copy, and fraction that are copied."""
    resample: Fraction = 0.25
    """pbt: probability that a value is redrawn instead of multiplied by 0.8 or 1.2 (a choice: moved to a neighbour)."""


class BudgetSpec(Spec):
    """When the search ends, and how many trials run at a time."""

    trials: Trials | None = None
    """Number of trials, including the one with the base job's values (trial 0); null = as many as a grid has, or as minutes
    allow."""
    minutes: Seconds | None = None
    """Minutes after which the command stops, running trials included; ``--resume`` continues them. null = no limit."""
    max_concurrent: Processes | None = None
    """Number of trials that run at a time; null = as many as fit the cluster. With cluster.gpus_per_worker below 1, several
    share a GPU."""
    max_failures: Restarts = 2
    """How often a trial whose process or machine died is restarted from its last checkpoint. A trial that fails by itself (loss
    not finite, out of memory, invalid job) is recorded and not retried."""


class ObjectiveSpec(Spec):
    """What the search optimises."""

    metric: Literal["AP", "AP50", "AP75", "APs", "APm", "APl"] = "AP"
    """COCO metric to maximise, in percent: that of a run's best checkpoint by AP on data.val, averaged over ``seeds``."""
    cost: Literal["params", "flops", "latency", "onnx_latency"] | None = None
    """Cost of the student to minimise as a second objective: params (million), flops (10^9 per forward pass at evaluation size,
    a multiply-add counts as two), latency (ms of that pass in PyTorch, measured in the trial's process), onnx_latency (ms of
    the trained student's ONNX file on images of data.val, on one CPU thread of that process). The search then finds a Pareto
    front. This only makes sense if the space has student keys. null = the metric alone."""


class SearchSpec(Spec):
    """A hyper-parameter search."""

    run: SearchRunSpec
    """Name, storage and seed of the search."""
    job: Text
    """The base job file. Relative paths are resolved against the command's current folder. Trial 0 has its values."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Job keys (``optim.epochs``) whose values replace the base job's in all trials."""
    space: dict[str, ParameterSpec]
    """Job keys to search, each with the values that it may take."""
    objective: ObjectiveSpec = ObjectiveSpec()
    """What the search optimises."""
    searcher: SearcherSpec = SearcherSpec()
    """How the values of a trial are chosen."""
    scheduler: SchedulerSpec = SchedulerSpec()
    """Which trials continue after an evaluation."""
    budget: BudgetSpec = BudgetSpec()
    """When the search ends, and how many trials run at a time."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000)] | None = None
    """Values of run.seed with which each trial is trained in turn, to average over them; the scheduler judges by the first, and
    only trials that it does not stop are trained with the others. null = the base job's seed."""
