"""A search as an Optuna storage, for optuna-dashboard and for whatever else reads one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from headkd_ray.errors import UserError
from headkd_ray.tuning.space import Search
from headkd_ray.tuning.study import EXTRA, directions, frozen_trials
from headkd_ray.tuning.trial_records import Trial

if TYPE_CHECKING:
    import optuna


def optuna_file(search: Search, trials: Sequence[Trial]) -> bytes:
    """Return an SQLite file that Optuna opens as ``sqlite:///FILE``, with one study of the search's name.

    It has all trials, in their order. Those that failed, were stopped or are running have Optuna's states for it (FAIL, PRUNED,
    RUNNING), and the cause of a failure is a user attribute, as are the results of each seed and values outside the space.

    Raises UserError if Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError(f"--optuna needs Optuna: {EXTRA}") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.db"
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        study = optuna.create_study(study_name=search.spec.run.name, storage=storage, directions=directions(search))
        objective = search.spec.objective
        study.set_user_attr("objectives", [objective.metric] + ([objective.cost] if objective.cost else []))
        study.add_trials(list(map(_with_all, frozen_trials(search, trials), trials)))
        storage.remove_session()
        storage.engine.dispose()
        return path.read_bytes()


def _with_all(own: optuna.trial.FrozenTrial, trial: Trial) -> optuna.trial.FrozenTrial:
    """Add to Optuna's trial its times and what Optuna has no field for."""
    own.datetime_start = datetime.fromtimestamp(trial.started)
    if trial.ended is not None:
        own.datetime_complete = datetime.fromtimestamp(trial.ended)
    for name, value in asdict(trial).items():
        if value and name in ("values", "cause", "results", "cost", "copies"):
            own.set_user_attr(name, value)
    return own
