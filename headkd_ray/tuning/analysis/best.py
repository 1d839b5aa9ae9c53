"""The best trial's job, as a job file ready for training."""

from __future__ import annotations

from collections.abc import Sequence

from headkd_ray.job import Job, render_job
from headkd_ray.tuning.analysis.table import ranked, spread
from headkd_ray.tuning.space import Search
from headkd_ray.tuning.trial_records import Trial


def best_trial(search: Search, trials: Sequence[Trial]) -> Trial | None:
    """Return the finished trial with the highest mean of the objective's metric, or None if none has finished."""
    first = next(iter(ranked(search, trials)), None)
    return first if first is not None and first.state == "finished" else None


def job_of_trial(search: Search, trial: Trial) -> Job:
    """Return the trial's job under a new run.name, with the base job's storage and seed."""
    base = search.base.run
    return search.job(trial.values, f"{search.spec.run.name}_trial{trial.number}", base.storage, base.seed)


def render_best(search: Search, trial: Trial) -> str:
    """Return the trial's job as a complete job file, with comments that say where it comes from."""
    objective = search.spec.objective
    score = f"{objective.metric} {spread(trial, objective.metric)} % on val, seeds {', '.join(trial.results)}"
    lines = [
        f"# Trial {trial.number} of the search {search.spec.run.name}: {score}.",
        "# The best of several trials is partly luck: evaluate it on images that the search has not seen, with new seeds.",
        "# Searched keys:",
        *(f"#   {key}" for key in trial.values),
    ]
    if trial.copies:
        lines.append("# Its values changed while it trained (population-based training); these are the last ones.")
    return "\n".join(lines) + "\n\n" + render_job(job_of_trial(search, trial))
