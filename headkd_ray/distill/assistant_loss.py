"""The ground-truth losses of an assistant, from which the student's pyramid learns what a head of another kind needs."""

from __future__ import annotations

from headkd_ray.detectors import head_class
from headkd_ray.detectors.base import Losses
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.distill.terms import Parts, Term
from headkd_ray.job import Job
from headkd_ray.teacher.source import AnyTeacher, TeacherSource


class AssistantLoss(Term):
    """The assistant's supervised losses ``loss_{assistant}_*``; a RoI head's are at the RoIs that the student proposes."""

    per_assistant = True

    def __init__(self, assistant: str, weight: float, warmup_steps: int = 0) -> None:
        super().__init__(weight, warmup_steps)
        self.assistant = assistant

    @classmethod
    def build(cls, parts: Parts, assistant: str) -> AssistantLoss:
        plan = parts.plans[assistant]
        return cls(assistant, plan.gt_weight, parts.job.distill.warmup_steps if plan.warm else 0)

    @classmethod
    def problems(cls, job: Job, teacher: AnyTeacher | None) -> list[str]:
        described = job.distill.assistant
        if teacher is None or described is None or head_class(teacher.detection_head.spec) is head_class(described):
            return []
        assert not isinstance(teacher, TeacherSource)  # its assistant has a head of ``described``'s kind
        return [
            "distill.assistant: describes an R-CNN head, but this teacher's assistant must have a head like its own, that of a "
            f"{teacher.spec.kind}; use null"
        ]

    def distances(self, forward: StepForward) -> Losses:
        return {f"loss_{self.assistant}_{name}": loss for name, loss in forward.assistant(self.assistant).losses.items()}
