"""Everything that can be wrong with a job's data, teacher and storage, found before a cluster is started."""

from __future__ import annotations

import torch

from headkd_ray.data.classes import check_same_classes
from headkd_ray.data.plan import train_rows
from headkd_ray.data.shards import ShardSet
from headkd_ray.distill import build_trainee
from headkd_ray.engine.run import run_folder
from headkd_ray.engine.teacher import load_teacher
from headkd_ray.errors import DataError, UserError
from headkd_ray.job import Job


def preflight(job: Job) -> None:
    """Open the splits, compare classes, load the teacher, build the models, probe the storage.

    Raises:
        UserError: every problem found, at once.
    """
    problems: list[str] = []
    splits: dict[str, ShardSet] = {}
    for name in ("train", "val"):
        try:
            splits[name] = ShardSet.open(getattr(job.data, name))
        except DataError as error:
            problems += error.problems
    if "train" in splits and not len(train_rows(splits["train"].index, job.data.keep_empty)):
        problems.append(f"{job.data.train}: no image has a box to train on; prepare another split")
    checks = [run_folder(job).check_writable]
    if len(splits) == 2:
        lists = {f"data.{name} ({getattr(job.data, name)})": split.meta.classes for name, split in splits.items()}
        checks.append(lambda: check_same_classes(lists))
    if "train" in splits:
        checks.append(lambda: _build(job, splits["train"].meta.classes))
    for check in checks:
        try:
            check()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)


def _build(job: Job, classes: tuple[str, ...]) -> None:
    teacher = load_teacher(job, classes)
    with torch.random.fork_rng():  # building draws initial weights; the run's own draw must not depend on it
        build_trainee(job, len(classes), teacher)
