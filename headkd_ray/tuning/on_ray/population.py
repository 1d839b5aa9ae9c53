"""Population-based training: the worst trials copy the state and the values of the best, and perturb the values."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from headkd_ray.engine.checkpoint import SCORE, UNSCORED, LocalCheckpoints, load_state, save_state, scores_of, seal
from headkd_ray.engine.log import Record
from headkd_ray.engine.optim import retune
from headkd_ray.engine.run import run_folder
from headkd_ray.job import Job
from headkd_ray.tuning.search_spec import ParameterSpec
from headkd_ray.tuning.space import Search, nearest
from headkd_ray.tuning.trial_records import SearchFolder, Trial

ORIGIN_FILE = "origin.json"
"""File in a checkpoint kept by Tune that says which trial wrote it."""


def population_scheduler(search: Search, time_attr: str) -> PopulationBasedTraining:
    """Return Ray Tune's scheduler over ``config["values"]``, which keeps values in their ranges."""
    spec = search.spec.scheduler

    def within(config: dict[str, Any]) -> dict[str, Any]:
        values = {key: nearest(search.spec.space[key], value) for key, value in config["values"].items()}
        return {**config, "values": values}

    return PopulationBasedTraining(
        time_attr=time_attr,
        metric=search.spec.objective.metric,
        mode="max",
        perturbation_interval=spec.perturb_epochs,
        hyperparam_mutations={"values": {key: _domain(parameter) for key, parameter in search.spec.space.items()}},
        quantile_fraction=spec.quantile,
        resample_probability=spec.resample,
        custom_explore_fn=within,
        log_config=False,
    )


def _domain(parameter: ParameterSpec) -> Any:
    if parameter.choice is not None:
        return list(parameter.choice)
    low, high = parameter.ends
    if parameter.kind == "uniform":
        return tune.uniform(low, high)
    if parameter.kind == "loguniform":
        return tune.loguniform(low, high)
    return (tune.randint if parameter.kind == "randint" else tune.lograndint)(low, high + 1)


def member(trial_id: str, numbers: list[int]) -> int:
    """Return the number of the trial with Tune's id ``trial_id``, whose last part counts the population.

    The config cannot tell, because a trial that copies another gets all of the other's config.
    """
    return numbers[int(trial_id.rpartition("_")[2])]


def save_for_others(trial: Trial, job: Job, evaluation: Record, folder: Path) -> None:
    """Copy the latest checkpoint of the trial's training into ``folder``, for trials that copy this one.

    ``evaluation``: the log record of its latest evaluation.
    """
    with LocalCheckpoints(run_folder(job)).latest() as latest:
        assert latest is not None, "a training that was evaluated has a checkpoint"
        shutil.copytree(latest, folder, dirs_exist_ok=True)
    origin = {
        "trial": trial.number,
        "run": job.run.name,
        "epoch": evaluation["epoch"],
        "steps_per_epoch": evaluation["steps"] // job.optim.epochs,
    }
    (folder / ORIGIN_FILE).write_text(json.dumps(origin))


def copied(trial: Trial, values: dict[str, Any], checkpoint: Path) -> tuple[Trial, dict[str, Any]] | None:
    """Return the trial after copying another's checkpoint, and the checkpoint's origin; None if the checkpoint is its own."""
    origin = json.loads((checkpoint / ORIGIN_FILE).read_text())
    if origin["trial"] == trial.number:
        return None
    copy = {"from": origin["trial"], "epoch": origin["epoch"], "values": trial.values}
    return replace(trial, values=values, copies=[*trial.copies, copy]), origin


def plant(job: Job, checkpoint: Path, origin: dict[str, Any], folder: SearchFolder) -> None:
    """Let the new training of ``job`` start from another's checkpoint and log, but with its own learning rate, momentum and
    weight decay."""
    run, donor = run_folder(job), folder.runs / origin["run"]
    state = load_state(checkpoint)
    retune(state, job.optim, job.data.batch_size * job.optim.accumulate, origin["steps_per_epoch"])
    checkpoints = LocalCheckpoints(run)
    draft = checkpoints.draft()
    shutil.copytree(checkpoint, draft, dirs_exist_ok=True)
    (draft / ORIGIN_FILE).unlink()
    save_state(draft, state)
    seal(draft)
    score = scores_of(draft).get(SCORE)  # a checkpoint within an epoch has none
    run.create()
    run.write("log.jsonl", donor.read("log.jsonl"))
    checkpoints.report(f"step_{state['step']:08d}", {SCORE: UNSCORED if score is None else score}, draft)
