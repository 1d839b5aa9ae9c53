"""The features that distillation compares: of which layers of a head, and which of them CKD reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from headkd_ray.detectors.roi_head import BoxOutputs

Maps = list[Tensor]
"""Features of a dense head: (B, C, H, W) of P3 to P7."""

Tap = Maps | Tensor
"""A post-ReLU feature that distillation reads: a dense head's maps, or a RoI head's rows (R, C), one a RoI."""


class HeadFeatures(NamedTuple):
    """The features of a detection head, an assistant's or a teacher's."""

    taps: Sequence[Tap]
    """What AKD compares, layer by layer."""
    lead: Tap
    """What CKD has the student imitate."""

    @classmethod
    def of_maps(cls, taps: Sequence[Maps]) -> HeadFeatures:
        """Features of a dense head, whose last classification conv, the first tap, leads."""
        return cls(taps, taps[0])

    @classmethod
    def of_stages(cls, stages: Sequence[BoxOutputs]) -> HeadFeatures:
        """Features of a RoI head's ``stages``, of which the last fully connected layer of the first leads."""
        return cls([tap for stage in stages for tap in stage.taps], stages[0].taps[-1])
