"""The training model: a student and the distillation terms of its loss. Only ``student`` is exported.

    L = L_student + sum over terms of  weight w(t) [t < stop] distance

HEAD (Wang et al., ECCV 2022, arXiv 2207.05345) has an assistant of the teacher's kind on the student's pyramid and three terms:
the assistant's ground-truth losses, AKD (assistant and teacher) and CKD (student and teacher). TF-HEAD has several assistants
of other kinds, each with its ground-truth losses and a CKD of which it is the target. ``methods.py`` builds these lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headkd_ray.data.batch import Batch
from headkd_ray.detectors import Detector, GroundTruth, PyramidDetector
from headkd_ray.detectors.base import Losses
from headkd_ray.distill.assistants import Assistant
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.distill.student import StudentForward
from headkd_ray.distill.terms import Term
from headkd_ray.teacher.frozen import FrozenTeacher, TeacherForward


class TrainingModel(nn.Module):
    """The model that a training step runs; without terms it trains ``student`` alone, supervised."""

    def __init__(
        self,
        student: Detector,
        assistants: Mapping[str, Assistant] | None = None,
        terms: Iterable[Term] = (),
        teacher: PyramidDetector | None = None,
    ) -> None:
        """``teacher`` is needed if a term reads it and its outputs do not come with the batches."""
        super().__init__()
        self.student = student
        self.assistants = nn.ModuleDict(assistants or {})
        self.terms = nn.ModuleList(terms)
        self._teacher = FrozenTeacher(teacher) if teacher is not None else None

    @property
    def teacher(self) -> PyramidDetector | None:
        """The frozen teacher, which is not in ``parameters()``, ``modules()`` or ``state_dict()``."""
        return self._teacher.detector if self._teacher else None

    def forward(self, batch: Batch, step: int, generator: torch.Generator | None = None) -> Losses:
        """Compute the weighted losses by name, float32 scalars; the total is their plain sum.

        ``step`` is the optimizer step from 0, for warm-ups; ``generator`` (on the batch's device; None = torch's default) draws
        the RoIs. AKD and CKD compare with ``batch.targets``, at their RoIs, if there are any; else with the teacher behind
        ``batch.ask``, if given; else with the model's own.
        """
        if not isinstance(self.student, PyramidDetector):  # no term reads it: the job's own checks
            x, truth = self._seen(batch)
            return self.student.supervised(x, truth, generator)
        return self.losses(self.run(batch, generator), step)

    def run(self, batch: Batch, generator: torch.Generator | None = None) -> StepForward:
        """Run a student with a pyramid on ``batch``; assistants and teacher follow when a term reads them."""
        assert isinstance(self.student, PyramidDetector)
        x, truth = self._seen(batch)
        student = StudentForward.run(self.student, x, truth, generator)
        teacher = None
        if self._teacher is not None:
            teacher = TeacherForward(self._teacher, self._teacher.input(batch.images, batch.sizes, x, self.student))
        return StepForward(student, self.assistants, teacher, batch.ask, batch.targets, generator)  # type: ignore[arg-type]

    def _seen(self, batch: Batch) -> tuple[Tensor, GroundTruth]:
        x = self.student.normalise(batch.images, batch.sizes)
        return x, GroundTruth.of(batch.boxes, batch.labels, batch.sizes, batch.weights, batch.background)

    def losses(self, forward: StepForward, step: int) -> Losses:
        """Return the student's own losses and those of all terms, in order, at optimizer step ``step``."""
        losses = dict(forward.student.losses)
        for term in self.terms:
            losses |= term(forward, step)
        return losses

    def without_teacher(self) -> TrainingModel:
        """Return a model of the same student and assistants with only those terms that read no teacher."""
        terms = [term for term in self.terms if isinstance(term, Term) and term.reads_teacher == "nothing"]
        return TrainingModel(self.student, self.assistants, terms)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self._teacher:
            self._teacher.apply(fn)
        return super()._apply(fn, recurse)
