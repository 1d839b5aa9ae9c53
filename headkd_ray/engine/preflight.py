"""Check a job's data, teacher and storage before a cluster is started."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

import torch

from headkd_ray.data.class_weights import class_weights_of
from headkd_ray.data.epoch_order import train_rows
from headkd_ray.data.meta import check_same_range
from headkd_ray.data.repeats import sampling_of
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.training_set import split_fingerprints, training_set
from headkd_ray.data.views import extreme_sizes
from headkd_ray.detectors import Detector
from headkd_ray.distill import build_training_model
from headkd_ray.distill.start import Start, load_start
from headkd_ray.engine.run import check_run, finished, is_started, run_folder, whole_job
from headkd_ray.engine.scoring import scoring_of_job
from headkd_ray.errors import JobError, UserError
from headkd_ray.job import Job
from headkd_ray.teacher import open_cache
from headkd_ray.teacher.loading import Teacher, load_teacher


def preflight(job: Job, found: Iterable[str] = (), longer: bool = False) -> Job:
    """Open the splits, compare classes, load the teacher, build the models and probe the storage, leaving nothing behind.

    Returns the job, with the architecture of its student if that is left to ``student.checkpoint``.

    Args:
        found: problems that are known already, to be told with the others.
        longer: whether a run is to be trained longer than it was started for.

    Raises:
        UserError: lists all problems found.
    """
    problems = list(found)
    try:
        job = whole_job(job)
    except UserError as error:  # its student cannot be built
        raise UserError([*problems, *_lines(error)]) from error
    splits: dict[str, ShardSet] = {}
    for name in ("train", "val"):
        try:
            splits[name] = ShardSet.open(getattr(job.data, name))
        except UserError as error:
            problems += error.problems
    if "train" in splits:
        if not len(train_rows(splits["train"].index, job.data.keep_empty)):
            problems.append(f"{job.data.train}: no image has a box to train on; prepare another split")
        try:
            splits["train"] = training_set(job, splits["train"])
        except UserError as error:
            problems += _lines(error)
    elif job.data.unlabelled is not None:
        try:
            ShardSet.open(job.data.unlabelled, labelled=False)
        except UserError as error:
            problems += error.problems
    checks: list[Callable[[], object]] = [lambda: check_run(job, _fingerprints(job, splits), longer)]
    if "train" in splits:
        checks.append(lambda: sampling_of(splits["train"], job.data))
        checks.append(lambda: class_weights_of(job, splits["train"]))
    if len(splits) == 2:
        checks.append(lambda: scoring_of_job(job, splits["train"], splits["val"]))
        ranges = {f"data.{name} ({getattr(job.data, name)})": split.meta.value_range for name, split in splits.items()}
        checks.append(lambda: check_same_range(ranges))
    checks.append(lambda: _check_start(job, splits.get("train")))
    checks.append(lambda: _build(job, splits.get("train")))
    for check in checks:
        try:
            check()
        except UserError as error:
            problems += _lines(error)
    problems = list(dict.fromkeys(problems))  # two checks may meet the same one
    if problems:
        raise UserError(problems, headline=f"run {job.run.name} cannot start:" if len(problems) > 1 else None)
    return job


def _lines(error: UserError) -> Sequence[str]:
    return error.problems if error.headline is None else [str(error)]


def _fingerprints(job: Job, splits: Mapping[str, ShardSet]) -> dict[str, str]:
    """Return the fingerprints of the splits and, if the run has ended, of the weights that it was given, by their job keys."""
    found = split_fingerprints(splits["train"]) if "train" in splits else {}
    found |= {"data.val": splits["val"].meta.fingerprint} if "val" in splits else {}
    given: dict[str, Callable[[Job, tuple[str, ...] | None], Start | Teacher | None] | None] = {
        "student.checkpoint": None if job.student.checkpoint is None else _start,
        "teacher.checkpoint" if job.teacher is None else job.teacher.source[0]: None if job.teacher is None else _teacher,
    }
    ended = False
    if any(given.values()):
        with suppress(UserError):  # found elsewhere
            ended = finished(run_folder(job)) is not None
    for key, load in given.items():
        with suppress(UserError):  # a run that has ended needs no checkpoint; other problems are found elsewhere
            if ended and load is not None and (loaded := load(job, None)) is not None:
                found[key] = loaded.fingerprint
    return found


def _check_start(job: Job, shards: ShardSet | None) -> None:
    """Check student.checkpoint, unless the run has been started before: it was checked then, and may not be needed again."""
    if job.student.checkpoint is not None and not is_started(job):
        _start(job, None if shards is None else shards.meta.classes)


def _start(job: Job, classes: tuple[str, ...] | None) -> Start | None:
    with torch.random.fork_rng(devices=[]):  # as in _build
        return load_start(job, classes)


def _teacher(job: Job, classes: tuple[str, ...] | None) -> Teacher | None:
    with torch.random.fork_rng(devices=[]):  # as in _build
        return load_teacher(job, classes)


def _build(job: Job, shards: ShardSet | None) -> None:
    """Build the models, and check the cache if the job reads one; ``shards`` is None if the data cannot be read."""
    classes = None if shards is None else shards.meta.classes
    with torch.random.fork_rng(devices=[]):  # building draws initial weights, which must not affect those of the run
        teacher = load_teacher(job, classes)
        network = None if teacher is None else teacher.detector
        outputs = len(classes) if classes is not None else network.num_classes if network is not None else 1
        model = build_training_model(job, outputs, network, steps_per_epoch=1)
        if shards is not None:
            _check_sizes(job, shards, model.student, teacher)
    if shards is not None and network is not None and job.teacher is not None and job.teacher.placement == "cache":
        open_cache(job, shards, network).check()


def _check_sizes(job: Job, shards: ShardSet, student: Detector, teacher: Teacher | None) -> None:
    """Try the detectors on the job's smallest and largest views, since many timm models accept only one image size.

    Raises:
        JobError: a detector does not accept them.
    """
    sizes = extreme_sizes(job.data, shards.index.height, shards.index.width)
    problems = [f"student.{problem}" for problem in student.size_problems(sizes)]
    if teacher is not None and job.teacher is not None and isinstance(teacher.detector, Detector):
        found = teacher.detector.size_problems(sizes, changeable=False)
        problems += [f"teacher.checkpoint ({job.teacher.checkpoint}): {problem}" for problem in found]
    if problems:
        raise JobError(problems)
