"""The features of a head that distillation compares, and the one of them that CKD reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from headkd_ray.detectors.roi_head import BoxOutputs

Maps = list[Tensor]
"""Feature maps (B, C, H, W) of a dense head, one for each of P3 to P7."""

Tap = Maps | Tensor
"""A post-ReLU feature that distillation reads: a dense head's maps, or a RoI head's rows (R, C), one per RoI."""


class HeadFeatures(NamedTuple):
    """The features of the detection head of an assistant or a teacher."""

    taps: Sequence[Tap]
    """The features that AKD compares, layer by layer."""
    lead: Tap
    """The feature that the student imitates in CKD."""

    @classmethod
    def of_maps(cls, taps: Sequence[Maps]) -> HeadFeatures:
        """Wrap the taps of a dense head; the lead is the first, the last classification conv."""
        return cls(taps, taps[0])

    @classmethod
    def of_stages(cls, stages: Sequence[BoxOutputs]) -> HeadFeatures:
        """Collect the taps of a RoI head's ``stages``; the lead is the last fully connected layer of the first stage."""
        return cls([tap for stage in stages for tap in stage.taps], stages[0].taps[-1])
