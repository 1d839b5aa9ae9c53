"""Assistants: detection heads of other kinds on the student's pyramid, which learn from labels.

Their features are compared with a teacher's (AKD) or, without a teacher, are themselves the target that the student imitates
(CKD). There are two sorts, as there are of detectors: dense heads, which take whole levels, and RoI heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headkd_ray.detectors import DenseHead, RoIHead, RoIs, StageOutput
from headkd_ray.detectors.base import Losses
from headkd_ray.detectors.head_features import HeadFeatures
from headkd_ray.detectors.ops.rois import sample_rois
from headkd_ray.distill.student import Sampler, StudentForward


class AssistantOutput(NamedTuple):
    """The outputs of an assistant for a batch."""

    losses: Losses
    """The assistant's own ground-truth losses by short name, unweighted."""
    features: HeadFeatures
    stages: Sequence[StageOutput]
    """The RoIs and outputs of each stage of a RoI head; empty for a dense head."""

    @property
    def counted(self) -> list[Tensor | None]:
        """For each of ``features.taps``, the mask (R,) of the rows that are not padding; None = all of it counts."""
        if not self.stages:
            return [None] * len(self.features.taps)
        return [rois.counted for rois, outputs in self.stages for _ in outputs.taps]

    def rois(self, student: StudentForward) -> RoIs | None:
        """Return the RoIs whose rows are the student's lead or ``features.lead``, or None if both are maps."""
        return self.stages[0].rois if self.stages else student.rois


class DenseAssistant(nn.Module):
    """A dense head on the student's P3 to P7."""

    def __init__(self, head: DenseHead[Any]) -> None:
        super().__init__()
        self.head = head

    def forward(self, student: StudentForward, generator: torch.Generator | None = None) -> AssistantOutput:
        """Compute the assistant's losses and features. Nothing is sampled, so ``generator`` is not used."""
        outputs = self.head(student.levels)
        losses = self.head.losses(outputs, student.truth)
        short = {name.removeprefix("loss_"): loss for name, loss in losses.items()}
        return AssistantOutput(short, HeadFeatures.of_maps(outputs.taps), [])


class RoIAssistant(nn.Module):
    """A RoI head on the finest four levels of the student's pyramid."""

    def __init__(self, head: RoIHead, sample: Sampler = sample_rois) -> None:
        """``sample`` draws RoIs from the proposals of a dense student."""
        super().__init__()
        self.head = head
        self.sample = sample

    def forward(self, student: StudentForward, generator: torch.Generator | None = None) -> AssistantOutput:
        """Compute the losses and features at the RoIs that the student proposes, sampled with ``generator``."""
        output = self.at(student, student.rois_for(self.head, self.sample, generator), generator)
        return output._replace(losses=self.head.losses(output.stages))

    def at(self, student: StudentForward, rois: RoIs, generator: torch.Generator | None = None) -> AssistantOutput:
        """Compute the features at ``rois``, without losses."""
        stages = self.head.stage_outputs(student.pyramid, rois, student.truth, generator)
        return AssistantOutput({}, HeadFeatures.of_stages([stage.outputs for stage in stages]), stages)


Assistant = DenseAssistant | RoIAssistant


def assistant_of(head: DenseHead[Any] | RoIHead) -> Assistant:
    """Wrap ``head`` as an assistant."""
    return RoIAssistant(head) if isinstance(head, RoIHead) else DenseAssistant(head)
