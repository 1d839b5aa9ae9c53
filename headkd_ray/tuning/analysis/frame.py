"""The trials of a search as a pandas data frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headkd_ray.errors import UserError
from headkd_ray.job.render import inline
from headkd_ray.report.tables import HEADLINE
from headkd_ray.tuning.space import Search
from headkd_ray.tuning.study import EXTRA
from headkd_ray.tuning.trial_records import SearchFolder, Trial

if TYPE_CHECKING:
    import pandas


def read_trials(folder: SearchFolder, search: Search, warn: Callable[[str], None]) -> list[Trial]:
    """Read all trials so far; those that have not ended get the learning curve from their training's log.

    ``warn`` is called for those that are left out (``SearchFolder.trials``).
    """
    metric, seed = search.spec.objective.metric, search.seeds[0]
    return [
        replace(trial, curve=folder.curve(trial, seed, metric)) if trial.state == "running" else trial
        for trial in folder.trials(search, warn)
    ]


def trial_frame(search: Search, trials: Sequence[Trial]) -> pandas.DataFrame:
    """Return a data frame with one row per trial, by number.

    Columns: trial; state (running, finished, stopped, failed); cause of a failure; started (UTC) and minutes until it ended;
    seeds and epochs (evaluated, with the first seed); AP, AP50, ... in percent (mean over seeds) and, with several seeds,
    AP_std, ... (sample standard deviation); best_seen, the objective's best evaluation so far; params (million), flops (10^9),
    latency (ms) if they were measured; student, that of the first seed; and each searched key under its dotted name, missing
    where it was not varied.
    """
    try:
        import pandas
    except ImportError:
        raise UserError(f"the analysis needs pandas: {EXTRA}") from None
    rows = [_row(search, trial) for trial in sorted(trials, key=lambda trial: trial.number)]
    frame = pandas.DataFrame(rows)
    if rows:
        frame["started"] = pandas.to_datetime(frame["started"], unit="s", utc=True)
    return frame


def _row(search: Search, trial: Trial) -> dict[str, Any]:
    seen = [value for _, value in trial.curve if value is not None]
    row: dict[str, Any] = {
        "trial": trial.number,
        "state": trial.state,
        "cause": trial.cause,
        "started": trial.started,
        "minutes": None if trial.ended is None else (trial.ended - trial.started) / 60,
        "seeds": len(trial.results),
        "epochs": max((epoch for epoch, _ in trial.curve), default=0),
        "best_seen": max(seen, default=None),
    }
    for metric in HEADLINE:
        row[metric] = trial.mean(metric)
    if len(search.seeds) > 1:
        for metric in HEADLINE:
            row[f"{metric}_std"] = trial.deviation(metric)
    row |= trial.cost
    row["student"] = next((result["student"] for result in trial.results.values()), None)
    for key, parameter in search.spec.space.items():
        numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in parameter.ends)
        value = trial.values.get(key)
        row[key] = value if numbers or key not in trial.values or isinstance(value, str) else inline(value)
    return row
