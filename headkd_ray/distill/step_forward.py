"""One forward pass as the loss terms read it: the outputs of student, assistants and teacher for a batch."""

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
"""A function that queries a teacher elsewhere.

It takes RoIs, stage by stage (none for a dense teacher), and returns the teacher's features there, on the given device.
"""


class Comparison(NamedTuple):
    """The outputs of an assistant and the features of the teacher at the same RoIs or levels."""

    assistant: AssistantOutput
    teacher: HeadFeatures


class StepForward:
    """The outputs of student, assistants and teacher for one batch.

    Those of assistants and teacher are computed when a term first reads them, and only once.
    """

    def __init__(
        self,
        student: StudentForward,
        assistants: Mapping[str, Assistant],
        teacher: TeacherForward | None = None,
        ask: AskTeacher | None = None,
        targets: SoftTargets | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Take the teacher's features from ``targets``, else from ``ask``, else from ``teacher``.

        ``targets`` were computed beforehand at RoIs of their own; ``teacher`` is in this process. ``generator`` draws the RoIs.
        """
        self.student = student
        self.teacher = teacher
        self._assistants = assistants
        self._ask = ask
        self._targets = targets
        self._generator = generator
        self._outputs: dict[str, AssistantOutput] = {}

    def assistant(self, name: str) -> AssistantOutput:
        """Return the outputs and losses of the assistant ``name``, at the RoIs that the student proposes."""
        if name not in self._outputs:
            self._outputs[name] = self._assistants[name](self.student, self._generator)
        return self._outputs[name]

    @cached_property
    def comparison(self) -> Comparison:
        """The single assistant of a method with a teacher, and the teacher, where both have outputs.

        That is everywhere, at the RoIs that the student proposes, or at those that the teacher chose beforehand.
        """
        ((name, assistant),) = self._assistants.items()
        if self._targets is not None:
            assert isinstance(assistant, RoIAssistant)  # the job's own checks
            # The assistant's own losses do not use these RoIs: chosen beforehand, they do not follow what the student gets
            # wrong, which would cost AP (docs/results.md).
            rois = chosen_rois(self._targets, self.student)
            return Comparison(assistant.at(self.student, rois), chosen_features(self._targets))
        output = self.assistant(name)
        rois_by_stage = [stage.rois for stage in output.stages]
        if self._ask is not None:
            return Comparison(output, self._ask(rois_by_stage, self.student.truth.boxes.device))
        assert self.teacher is not None, "a term reads a teacher, but there is none"
        return Comparison(output, self.teacher.head_features(rois_by_stage))
