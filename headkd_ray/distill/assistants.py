"""Assistants: detection heads of other kinds on the student's pyramid. They learn from labels; their features are compared
with a teacher's (AKD) or, without one, are what the student is to imitate (CKD).

There are two sorts, as there are of detectors: dense heads, which take whole levels, and RoI heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from headkd_ray.detectors import DenseHead, RoIHead, RoIs, StageOutput
from headkd_ray.detectors.base import Losses
from headkd_ray.detectors.head_features import HeadFeatures
from headkd_ray.detectors.ops.rois import sample_rois
from headkd_ray.distill.student import Sampler, StudentForward


class AssistantOutput(NamedTuple):
    """What an assistant makes of a batch."""

    losses: Losses
    """Its own ground-truth losses, by short name; unweighted."""
    features: HeadFeatures
    stages: Sequence[StageOutput]
    """Of a RoI head: each stage's RoIs and outputs; empty for a dense head."""

    def rois(self, student: StudentForward) -> RoIs | None:
        """The RoIs of the rows that the student's lead or ``features.lead`` has; None if both are maps."""
        return self.stages[0].rois if self.stages else student.rois


class DenseAssistant(nn.Module):
    """A dense head on the student's P3 to P7."""

    def __init__(self, head: DenseHead[Any]) -> None:
        super().__init__()
        self.head = head

    def forward(self, student: StudentForward, generator: torch.Generator | None = None) -> AssistantOutput:
        """Its losses and features; it draws nothing."""
        outputs = self.head(student.levels)
        losses = self.head.losses(outputs, student.truth)
        short = {name.removeprefix("loss_"): loss for name, loss in losses.items()}
        return AssistantOutput(short, HeadFeatures.of_maps(outputs.taps), [])


class RoIAssistant(nn.Module):
    """A RoI head on the finest four levels of the student's pyramid."""

    def __init__(self, head: RoIHead, sample: Sampler = sample_rois) -> None:
        """``sample`` makes RoIs of what a dense student proposes."""
        super().__init__()
        self.head = head
        self.sample = sample

    def forward(self, student: StudentForward, generator: torch.Generator | None = None) -> AssistantOutput:
        """Its losses and features at the RoIs that the student proposes, drawn by ``generator``."""
        output = self.at(student, student.rois_for(self.head, self.sample, generator), generator)
        return output._replace(losses=self.head.losses(output.stages))

    def at(self, student: StudentForward, rois: RoIs, generator: torch.Generator | None = None) -> AssistantOutput:
        """Its features at ``rois``, without losses."""
        stages = self.head.stage_outputs(student.pyramid, rois, student.truth, generator)
        return AssistantOutput({}, HeadFeatures.of_stages([stage.outputs for stage in stages]), stages)


Assistant = DenseAssistant | RoIAssistant


def assistant_of(head: DenseHead[Any] | RoIHead) -> Assistant:
    """The assistant that learns through ``head``."""
    return RoIAssistant(head) if isinstance(head, RoIHead) else DenseAssistant(head)
