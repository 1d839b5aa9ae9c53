"""Choose the values of the next trial from the trials so far: first the base job's own, then a grid's or Optuna's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from headkd_ray.errors import UserError
from headkd_ray.job.render import inline
from headkd_ray.tuning.search_spec import ParameterSpec
from headkd_ray.tuning.space import Search, Values, base_values, contains, grid, ordered, rounded, varied
from headkd_ray.tuning.trial_records import Trial

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

Direction = Literal["minimize", "maximize"]
EXTRA = 'python -m pip install "headkd-ray[tune]"'


def check_optuna(search: Search) -> None:
    """Raise UserError if the searcher needs Optuna and it is not installed."""
    if search.spec.searcher.kind == "grid":
        return
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError(f"searcher.kind {search.spec.searcher.kind} needs Optuna: {EXTRA}") from None


def propose(search: Search, trials: Sequence[Trial], number: int | None = None, earlier: Sequence[Trial] = ()) -> Values | None:
    """Return the values of the next trial, or None when a grid is exhausted.

    Args:
        trials: all trials so far, ended or not.
        number: the next trial's number; None = the number of trials.
        earlier: trials of an earlier search (``warm_start.earlier_trials``).
    """
    if not trials:
        return base_values(search)
    if search.spec.searcher.kind == "grid":
        seen = [trial.values for trial in trials]
        return next((values for values in grid(search) if values not in seen), None)
    study = study_of(search, [*earlier, *trials])
    study.sampler = _sampler(search, number=len(trials) if number is None else number)
    asked = study.ask()
    values: Values = {}
    base = search.base
    for key in ordered(search.spec.space):
        if varied(key, search, base, values):
            values[key] = _suggested(asked, key, search.spec.space[key])
    return values


def study_of(search: Search, trials: Sequence[Trial]) -> optuna.study.Study:
    """Return the trials as an Optuna study that maximises the metric and minimises the cost.

    It omits failed trials, which say nothing about the metric, and those with values outside the space (possibly trial 0).
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=directions(search))
    said_something = [trial for trial in trials if trial.state != "failed" and fits(search, trial)]
    study.add_trials(frozen_trials(search, said_something))
    return study


def directions(search: Search) -> list[Direction]:
    """Return Optuna's direction of each objective."""
    return ["maximize"] if search.spec.objective.cost is None else ["maximize", "minimize"]


def fits(search: Search, trial: Trial) -> bool:
    """Return whether all values of a trial lie in the space."""
    return all(contains(search.spec.space[key], value) for key, value in trial.values.items())


def frozen_trials(search: Search, trials: Sequence[Trial]) -> list[optuna.trial.FrozenTrial]:
    """Return the trials as Optuna's; without their values if these do not fit."""
    from optuna.trial import TrialState, create_trial

    states = {
        "finished": TrialState.COMPLETE,
        "stopped": TrialState.PRUNED,
        "running": TrialState.RUNNING,
        "failed": TrialState.FAIL,
    }
    distributions = {key: distribution(parameter) for key, parameter in search.spec.space.items()}
    return [
        create_trial(
            state=states[trial.state],
            values=scores(search, trial) if trial.state == "finished" else None,
            params={key: _label(search.spec.space[key], value) for key, value in values.items()},
            distributions={key: distributions[key] for key in values},
            intermediate_values={int(epoch): value for epoch, value in trial.curve if value is not None},
            user_attrs={"number": trial.number},
        )
        for trial in trials
        for values in [trial.values if fits(search, trial) else {}]
    ]


def scores(search: Search, trial: Trial) -> list[float]:
    """Return a finished trial's metric, and its cost if the objective has one."""
    objective = search.spec.objective
    return [trial.mean(objective.metric)] + ([trial.cost[objective.cost]] if objective.cost is not None else [])


def distribution(parameter: ParameterSpec) -> BaseDistribution:
    """Return Optuna's distribution of a parameter. Choices become their YAML text, because Optuna does not accept lists."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.choice is not None:
        return CategoricalDistribution([inline(value) for value in parameter.choice])
    low, high = parameter.ends
    log = parameter.kind.startswith("log")
    if "int" in parameter.kind:
        step = int(parameter.step or 1)
        return IntDistribution(low, low + (high - low) // step * step, log=log, step=step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Optuna warns if whole steps do not reach the highest value
        return FloatDistribution(low, high, log=log, step=parameter.step)


def _label(parameter: ParameterSpec, value: Any) -> Any:
    return inline(value) if parameter.choice is not None else value


def _suggested(asked: optuna.trial.Trial, key: str, parameter: ParameterSpec) -> Any:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    space = distribution(parameter)
    if isinstance(space, CategoricalDistribution):
        assert parameter.choice is not None
        return parameter.choice[space.choices.index(asked.suggest_categorical(key, space.choices))]
    assert hasattr(space, "low") and hasattr(space, "high") and hasattr(space, "step") and hasattr(space, "log")
    if isinstance(space, IntDistribution):
        return asked.suggest_int(key, space.low, space.high, step=space.step, log=space.log)
    value = asked.suggest_float(key, space.low, space.high, step=space.step, log=space.log)
    return value if space.step is None else rounded(value)


def _sampler(search: Search, number: int) -> optuna.samplers.BaseSampler:
    """Return a sampler seeded by (seed, trial number), so that a resumed search continues as if it had not been stopped."""
    import optuna

    seed = (search.spec.run.seed * 1_000_003 + number) % 2**32
    if search.spec.searcher.kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of multivariate and group, since 2020
        return optuna.samplers.TPESampler(
            n_startup_trials=search.spec.searcher.startup_trials,
            multivariate=True,
            group=True,  # models keys that are varied only in some trials separately
            constant_liar=True,  # avoids proposing the values of a running trial
            seed=seed,
        )
