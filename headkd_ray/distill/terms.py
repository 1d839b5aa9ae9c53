"""What a distillation term is: one addend of the training loss, with all that belongs to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from headkd_ray.detectors import Detector
from headkd_ray.detectors.base import Losses
from headkd_ray.distill.assistants import Assistant
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.job import Job
from headkd_ray.job.module_specs import Spec


@dataclass(frozen=True)
class AssistantPlan:
    """An assistant as the job has it."""

    head: Spec
    """Of its head."""
    gt_weight: float
    """Weight of its ground-truth losses."""
    ckd_weight: float
    warm: bool
    """Whether its ground-truth losses are warmed up too."""
    decouple: bool = False
    """Whether CKD has an adapter for each anchor of a cell."""


@dataclass(frozen=True)
class Parts:
    """What a term is built from."""

    job: Job
    student: Detector
    teacher: Detector | None
    assistants: Mapping[str, Assistant]
    plans: Mapping[str, AssistantPlan]
    """Of each of the assistants."""
    steps_per_epoch: int
    """Optimizer steps."""


class Term(nn.Module, ABC):
    """One addend of the training loss. It owns its weight, warm-up and stop, its adapters and its distance; it says what it
    reads of a teacher, and what of a job does not fit it.

    A term whose factor is 0 stays part of the graph: DDP expects every parameter to get a gradient in every step.
    """

    per_assistant: ClassVar[bool] = False
    """Whether there is one of these for each assistant, or one in all."""
    reads_teacher: Literal["nothing", "head", "pyramid"] = "nothing"
    """head = its head's features, which may also be computed elsewhere or beforehand; pyramid = its pyramid, in the step."""

    def __init__(self, weight: float, warmup_steps: int = 0, stop: int | None = None) -> None:
        """The weight rises linearly from 0 at step 0 to ``weight`` at ``warmup_steps``; it is 0 from step ``stop`` on."""
        super().__init__()
        self.weight = weight
        self.warmup_steps = warmup_steps
        self.stop = stop

    @classmethod
    @abstractmethod
    def build(cls, parts: Parts, assistant: str) -> Term:
        """The term of a job, for the ``assistant`` of that name if it is ``per_assistant``; its adapters are fresh."""

    @classmethod
    def problems(cls, job: Job, teacher: Detector | None) -> list[str]:
        """What of the job or its loaded ``teacher`` does not fit the term, each with the key to mend."""
        return []

    @abstractmethod
    def distances(self, forward: StepForward) -> Losses:
        """The term's losses by name (``loss_*``), float32 scalars, unweighted."""

    def factor(self, step: int) -> float:
        """Share of the weight at optimizer step ``step``."""
        return 0.0 if self.stop is not None and step >= self.stop else warmup(step, self.warmup_steps)

    def forward(self, forward: StepForward, step: int) -> Losses:
        """The weighted losses at optimizer step ``step``."""
        weight = self.weight * self.factor(step)
        return {name: weight * distance for name, distance in self.distances(forward).items()}


def warmup(step: int, steps: int) -> float:
    """w(t) = min(t / steps, 1): from 0 at step 0 to 1 from ``steps`` on; always 1 if ``steps`` is 0."""
    return min(step / steps, 1.0) if steps else 1.0
