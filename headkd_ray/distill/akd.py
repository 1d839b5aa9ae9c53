"""Assistant knowledge distillation (AKD): the assistant's layers imitate the teacher's on the same levels or RoIs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from headkd_ray.detectors.base import Losses
from headkd_ray.detectors.ops.losses import mean_squared_error
from headkd_ray.distill.assistants import DenseAssistant
from headkd_ray.distill.distances import DISTANCES, Distance, adapted_distance
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.distill.terms import Parts, Term
from headkd_ray.job import Job
from headkd_ray.teacher.source import AnyTeacher, TeacherSource, can_choose_rois


class AKD(Term):
    """The AKD losses ``loss_akd_1``, ``loss_akd_2``, ..., one per layer.

    Each layer has a trained adapter from the assistant's width to the teacher's: a Linear on rows, a 1x1 conv on maps.
    """

    per_assistant = True
    reads_teacher = "head"

    def __init__(
        self,
        adapters: Sequence[nn.Module],
        weight: float = 1.0,
        warmup_steps: int = 0,
        distance: Distance = mean_squared_error,
    ) -> None:
        super().__init__(weight, warmup_steps)
        self.adapters = nn.ModuleList(adapters)
        self.distance = distance

    @classmethod
    def build(cls, parts: Parts, assistant: str) -> AKD:
        assert parts.teacher is not None
        helper, spec = parts.assistants[assistant], parts.job.distill
        widths = zip(helper.head.tap_channels, parts.teacher.detection_head.tap_channels, strict=True)
        adapters = [adapter(own, theirs, maps=isinstance(helper, DenseAssistant)) for own, theirs in widths]
        return cls(adapters, spec.akd_weight, spec.warmup_steps, DISTANCES[spec.distance])

    @classmethod
    def problems(cls, job: Job, teacher: AnyTeacher | None) -> list[str]:
        assert teacher is not None
        found = []
        if job.distill.rois == "teacher" and not can_choose_rois(teacher):
            assert not isinstance(teacher, TeacherSource)
            found.append(
                "distill.rois: teacher needs a faster_rcnn teacher, whose features depend on a RoI alone, or teacher.kind: "
                f"transformers; this one is a {teacher.spec.kind}, so use student"
            )
        if job.distill.assistant is not None and can_choose_rois(teacher):
            own, theirs = job.distill.assistant.fcs, len(teacher.detection_head.tap_channels)
            if own != theirs:
                found.append(
                    f"distill.assistant.fcs: the assistant has {own} fully connected layers, the teacher {theirs};"
                    " AKD pairs them one to one"
                )
        return found

    def distances(self, forward: StepForward) -> Losses:
        assistant, teacher = forward.comparison
        pairs = zip(self.adapters, assistant.features.taps, teacher.taps, assistant.counted, strict=True)
        return {f"loss_akd_{i}": adapted_distance(self.distance, *pair) for i, pair in enumerate(pairs, start=1)}


def adapter(own: int, theirs: int, maps: bool, bias: bool = True) -> nn.Module:
    """Create a trainable layer from width ``own`` to ``theirs``: a 1x1 conv for ``maps``, a Linear for rows."""
    return nn.Conv2d(own, theirs, 1, bias=bias) if maps else nn.Linear(own, theirs, bias=bias)
