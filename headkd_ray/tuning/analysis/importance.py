"""How much of the difference between trials each searched key explains."""

from __future__ import annotations

from collections.abc import Sequence

from headkd_ray.tuning.space import Search
from headkd_ray.tuning.study import EXTRA, study_of
from headkd_ray.tuning.trial_records import Trial

FEWEST = 8
"""Finished trials below which a forest says nothing."""


def importances(search: Search, trials: Sequence[Trial]) -> tuple[dict[str, float], str]:
    """fANOVA: share of the variance of the objective's metric that each key explains by itself, by a random forest over the
    finished trials (Hutter et al., ICML 2014, as in Optuna); and a sentence on what it stands on, or why it is empty.

    Keys that are varied in some trials alone are left out.
    """
    finished = [trial for trial in trials if trial.state == "finished"]
    if len(finished) < FEWEST:
        return {}, f"{len(finished)} trials have finished; importances need at least {FEWEST}."
    try:
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances

        evaluator = FanovaImportanceEvaluator(seed=0)
        study = study_of(search, finished)
        found = get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[0])
    except ImportError:
        return {}, f"Importances need Optuna and scikit-learn: {EXTRA}"
    except (RuntimeError, ValueError) as error:  # no variance in the scores
        return {}, f"No importances: {error}"
    missing = [key for key in search.spec.space if key not in found]
    left_out = f" Left out, for not all of these have them: {', '.join(missing)}." if missing else ""
    return dict(found), f"fANOVA over {len(study.trials)} finished trials.{left_out}"
