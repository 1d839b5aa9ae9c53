"""One forward pass as the loss terms read it: what student, assistants and teacher make of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from headkd_ray.detectors import RoIs
from headkd_ray.detectors.head_features import HeadFeatures
from headkd_ray.distill.assistants import Assistant, AssistantOutput, RoIAssistant
from headkd_ray.distill.chosen_rois import chosen_features, chosen_rois
from headkd_ray.distill.student import StudentForward
from headkd_ray.soft_targets import SoftTargets
from headkd_ray.teacher.frozen import TeacherForward

AskTeacher = Callable[[Sequence[RoIs], torch.device], HeadFeatures]
"""A teacher elsewhere: from RoIs, stage by stage (none for a dense teacher), to its features, on a device."""


class Comparison(NamedTuple):
    """An assistant and the teacher about the same RoIs or levels."""

    assistant: AssistantOutput
    teacher: HeadFeatures


class StepForward:
    """Student, assistants and teacher on one batch. Each is computed when a term first reads it, and once."""

    def __init__(
        self,
        student: StudentForward,
        assistants: Mapping[str, Assistant],
        teacher: TeacherForward | None = None,
        ask: AskTeacher | None = None,
        targets: SoftTargets | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """The teacher's answers come from ``targets``, which were computed beforehand at RoIs of their own, else from ``ask``,
        else from ``teacher``, which is in this process. ``generator`` draws the RoIs."""
        self.student = student
        self.teacher = teacher
        self._assistants = assistants
        self._ask = ask
        self._targets = targets
        self._generator = generator
        self._outputs: dict[str, AssistantOutput] = {}

    def assistant(self, name: str) -> AssistantOutput:
        """What the assistant ``name`` makes of the batch, with its losses, at the RoIs that the student proposes."""
        if name not in self._outputs:
            self._outputs[name] = self._assistants[name](self.student, self._generator)
        return self._outputs[name]

    @cached_property
    def comparison(self) -> Comparison:
        """The one assistant beside a teacher, and the teacher, where both answer: everywhere, at the RoIs that the student
        proposes, or at those that the teacher chose beforehand."""
        ((name, assistant),) = self._assistants.items()
        if self._targets is not None:
            assert isinstance(assistant, RoIAssistant)  # the job's own checks
            # Not for the assistant's own losses: RoIs that were chosen beforehand do not follow what the student gets wrong,
            # and cost AP there (docs/results.md).
            rois = chosen_rois(self._targets, self.student)
            return Comparison(assistant.at(self.student, rois), chosen_features(self._targets))
        output = self.assistant(name)
        asked = [stage.rois for stage in output.stages]
        if self._ask is not None:
            return Comparison(output, self._ask(asked, self.student.truth.boxes.device))
        assert self.teacher is not None, "nobody answers for the teacher"
        return Comparison(output, self.teacher.head_features(asked))
