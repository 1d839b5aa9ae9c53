"""Assistants: detection heads of other kinds on the student's pyramid. They learn from labels; their features are compared
with a teacher's (AKD) or, without one, are what the student is to imitate (CKD).

There are two sorts, as there are of detectors: heads that look at whole levels and heads that look at RoIs. Whoever adds a
detector adds a head of one of the sorts, and every pair with it works.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from headkd_ray.detectors import RoIs
from headkd_ray.detectors.roi_head import Look, RoIOutputs
from headkd_ray.distill.scene import Maps, Scene, Tap


class Insight(NamedTuple):
    """The features of a head, an assistant's or a teacher's, that distillation reads."""

    taps: Sequence[Tap]
    """What AKD compares, layer by layer."""
    lead: Tap
    """What CKD has the student imitate."""

    @classmethod
    def of_maps(cls, taps: Sequence[Maps]) -> Insight:
        """A dense head's: it leads with its last classification conv."""
        return cls(taps, taps[0])

    @classmethod
    def of_stages(cls, stages: Sequence[RoIOutputs]) -> Insight:
        """A RoI head's, or a cascade's with its ``stages`` one after another: the first one's last fc leads."""
        return cls([tap for stage in stages for tap in stage.taps], stages[0].taps[-1])


class Advice(NamedTuple):
    """What an assistant has to say about a scene."""

    losses: dict[str, Tensor]
    """Its own ground-truth losses, by short name; unweighted."""
    insight: Insight
    looks: Sequence[Look]
    """What each stage of a RoI head looked at and said; empty for a dense head."""

    def rois(self, scene: Scene) -> RoIs | None:
        """The RoIs that the rows belong to which the student's tap or ``insight.lead`` has; None if both are maps."""
        return self.looks[0].rois if self.looks else scene.own


class DenseAssistant(nn.Module):
    """A dense head on P3 to P7."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, scene: Scene) -> Advice:
        outputs = self.head(scene.levels)
        losses = self.head.losses(outputs, scene.sizes, scene.boxes, scene.labels)
        return Advice({name.removeprefix("loss_"): loss for name, loss in losses.items()}, Insight.of_maps(outputs.taps), [])


class RoIAssistant(nn.Module):
    """A RoI head on the finest four levels of the student's pyramid. It learns at the RoIs that the student proposes."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, scene: Scene) -> Advice:
        advice = self.at(scene, scene.draw(self.head.stages[0].spec))
        return advice._replace(losses=self.head.losses(advice.looks))

    def at(self, scene: Scene, rois: RoIs) -> Advice:
        """What it sees at ``rois``, without losses."""
        looks = self.head.looks(scene.features, rois, scene.truth, scene.sizes, scene.generator)
        return Advice({}, Insight.of_stages([look.outputs for look in looks]), looks)


Assistant = DenseAssistant | RoIAssistant
