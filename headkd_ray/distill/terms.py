"""The base class of distillation terms: one addend of the training loss, with all that belongs to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from headkd_ray.detectors import PyramidDetector
from headkd_ray.detectors.base import Losses
from headkd_ray.distill.assistants import Assistant
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.job import Job
from headkd_ray.job.module_specs import Spec
from headkd_ray.teacher.source import AnyTeacher


@dataclass(frozen=True)
class AssistantPlan:
    """An assistant as the job describes it."""

    head: Spec
    """The spec of the assistant's head."""
    gt_weight: float
    """Weight of the assistant's ground-truth losses."""
    ckd_weight: float
    warm: bool
    """Whether the ground-truth losses are warmed up too."""
    decouple: bool = False
    """Whether CKD has an adapter for each anchor of a cell."""


@dataclass(frozen=True)
class Parts:
    """Everything from which terms are built."""

    job: Job
    student: PyramidDetector
    teacher: AnyTeacher | None
    assistants: Mapping[str, Assistant]
    plans: Mapping[str, AssistantPlan]
    """The plan of each assistant, by name."""
    steps_per_epoch: int
    """Optimizer steps per epoch."""


class Term(nn.Module, ABC):
    """One addend of the training loss.

    It owns its weight, warm-up and stop, its adapters and its distance; it declares what it reads of a teacher, and reports
    what in a job does not fit it. A term whose factor is 0 stays part of the graph, because DDP expects every parameter to get
    a gradient in every step.
    """

    per_assistant: ClassVar[bool] = False
    """Whether there is one term of this class per assistant, or only one."""
    reads_teacher: Literal["nothing", "head", "pyramid"] = "nothing"
    """What the term reads of a teacher.

    head = its head's features, which may also be computed elsewhere or beforehand; pyramid = its pyramid, in the step.
    """

    def __init__(self, weight: float, warmup_steps: int = 0, stop: int | None = None) -> None:
        """Let the weight rise linearly from 0 at step 0 to ``weight`` at ``warmup_steps``, and be 0 from step ``stop`` on."""
        super().__init__()
        self.weight = weight
        self.warmup_steps = warmup_steps
        self.stop = stop

    @classmethod
    @abstractmethod
    def build(cls, parts: Parts, assistant: str) -> Term:
        """Build the term of a job with fresh adapters, for the ``assistant`` of that name if it is ``per_assistant``."""

    @classmethod
    def build_all(cls, parts: Parts, assistant: str) -> Sequence[Term]:
        """Build all terms of this class that a job has for ``assistant``: one, unless a subclass says otherwise."""
        return [cls.build(parts, assistant)]

    @classmethod
    def problems(cls, job: Job, teacher: AnyTeacher | None) -> list[str]:
        """List what in the job or its loaded ``teacher`` does not fit the term, each with the key to mend."""
        return []

    @abstractmethod
    def distances(self, forward: StepForward) -> Losses:
        """Compute the term's unweighted losses by name (``loss_*``), float32 scalars."""

    def factor(self, step: int) -> float:
        """Return the factor on the weight at optimizer step ``step``, in 0..1."""
        return 0.0 if self.stop is not None and step >= self.stop else warmup(step, self.warmup_steps)

    def forward(self, forward: StepForward, step: int) -> Losses:
        """Compute the weighted losses at optimizer step ``step``."""
        weight = self.weight * self.factor(step)
        return {name: weight * distance for name, distance in self.distances(forward).items()}


def warmup(step: int, steps: int) -> float:
    """Return the warm-up factor w(t) = min(t / steps, 1); it is always 1 if ``steps`` is 0."""
    return min(step / steps, 1.0) if steps else 1.0
