"""Importance of the searched keys: how much of the difference between trials each explains."""

from __future__ import annotations

from collections.abc import Sequence

from headkd_ray.tuning.space import Search
from headkd_ray.tuning.study import EXTRA, study_of
from headkd_ray.tuning.trial_records import Trial

FEWEST = 8
"""Minimum number of finished trials for a meaningful estimate."""
TREES_TIMES_TRIALS = 8192
"""Of 500 trials, 64 trees take 21 s and 16 take 5 s."""


def importances(search: Search, trials: Sequence[Trial]) -> tuple[dict[str, float], str]:
    """Return the share of the metric's variance that each key explains by itself, and a sentence on its basis or absence.

    The shares come from fANOVA, a random forest over the finished trials (Hutter et al., ICML 2014, as in Optuna). Keys that
    are varied only in some trials are left out.
    """
    finished = [trial for trial in trials if trial.state == "finished"]
    if len(finished) < FEWEST:
        some = "1 trial has" if len(finished) == 1 else f"{len(finished)} trials have"
        return {}, f"{some} finished; importances need at least {FEWEST}, so {FEWEST - len(finished)} more."
    try:
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances

        evaluator = FanovaImportanceEvaluator(n_trees=_trees(len(finished)), seed=0)
        study = study_of(search, finished)
        found = get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[0])
    except ImportError:
        return {}, f"Importances need Optuna and scikit-learn: {EXTRA}"
    except (RuntimeError, ValueError) as error:  # no variance in the scores
        return {}, f"No importances: {error}"
    missing = [key for key in search.spec.space if key not in found]
    left_out = f" Left out, because not all of these have them: {', '.join(missing)}." if missing else ""
    return dict(found), f"fANOVA over {len(study.trials)} finished trials.{left_out}"


def _trees(trials: int) -> int:
    """Return the number of the forest's trees: Optuna's 64, and fewer of many trials, of which each tree needs more time."""
    return min(64, max(8, TREES_TIMES_TRIALS // trials))
