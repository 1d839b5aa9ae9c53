"""A job under check, and what several checks need of it, which is made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast, get_args

from headkd_ray.checkup.box_statistics import BoxStatistics, box_statistics
from headkd_ray.checkup.findings import SplitName
from headkd_ray.checkup.similar_images import Fingerprints, fingerprints
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.training_set import training_set
from headkd_ray.data.views import View, eval_view
from headkd_ray.errors import DataError, UserError
from headkd_ray.job import Job, TeacherSpec
from headkd_ray.profiling.step_trial import StepTrial, try_steps, view_scales

T = TypeVar("T")


@dataclass(frozen=True)
class CheckOptions:
    """How thoroughly a job is checked."""

    images: int = 5000
    """Images of each split that are opened, to be compared with each other."""
    val_images: int = 50
    """Validation images on which the teacher is evaluated."""
    least_ap: float = 20.0
    """AP of the teacher, in percent, below which it is called out."""
    baseline: str | None = None
    """Checkpoint of the student trained without a teacher, which the teacher should be better than."""
    skip: frozenset[str] = frozenset()
    """Names of the checks that are left out."""


class Subject:
    """A job under check. Whatever cannot be read raises the same UserError each time that it is asked for."""

    def __init__(self, job: Job, options: CheckOptions) -> None:
        self.job, self.options = job, options
        self._made: dict[Any, Any] = {}

    @property
    def splits(self) -> dict[SplitName, ShardSet]:
        """The splits that can be opened, by their names: train, val. Raises DataError if there is none."""
        found: dict[SplitName, ShardSet] = {}
        for name in get_args(SplitName):
            try:
                found[name] = self.split(name)
            except UserError:
                continue
        if not found:
            raise DataError("neither data.train nor data.val can be opened")
        return found

    @property
    def teacher(self) -> TeacherSpec | None:
        """The job's teacher if it is a network; None if it has none, or predictions alone."""
        teacher = self.job.teacher
        return teacher if teacher is not None and teacher.is_network else None

    def split(self, name: SplitName) -> ShardSet:
        """Return the split ``name``. Raises DataError if it cannot be opened."""
        return self._once(("split", name), lambda: ShardSet.open(getattr(self.job.data, name)))

    def view(self, name: SplitName) -> View:
        """Return the view in which the split's images are shown: of training, at the middle of data.short_side."""
        data = self.job.data
        return View(round(sum(data.short_side) / 2), data.long_side) if name == "train" else eval_view(data)

    def statistics(self, name: SplitName) -> BoxStatistics:
        """Return the statistics of the split's boxes. Raises DataError if it cannot be read."""

        def make() -> BoxStatistics:
            shards = self.split(name)
            return box_statistics(shards, view_scales(shards.index, self.view(name)))

        return self._once(("statistics", name), make)

    def fingerprints(self, name: SplitName) -> Fingerprints:
        """Return the fingerprints of the split's first ``options.images`` images. Raises DataError if they cannot be read."""
        return self._once(("fingerprints", name), lambda: fingerprints(self.split(name), self.options.images))

    def trial(self) -> StepTrial:
        """Return what the largest training steps needed. Raises UserError as ``try_steps``, or if they were left out."""
        if "steps" in self.options.skip:
            raise UserError("the steps were left out (--skip)")
        return self._once("trial", lambda: try_steps(self.job, training_set(self.job, self.split("train")), self.split("val")))

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._made:
            try:
                self._made[key] = make()
            except UserError as error:
                self._made[key] = error
        if isinstance(self._made[key], UserError):
            raise self._made[key]
        return cast(T, self._made[key])
