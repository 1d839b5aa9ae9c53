"""What a student makes of a batch, as far as its assistants and CKD need to know; the same for every kind of student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headkd_ray.detectors import DenseDetector, Detector, RoIs, TwoStageDetector
from headkd_ray.detectors.matching import Truth
from headkd_ray.detectors.rois import sample_rois
from headkd_ray.job import RoIHeadSpec

Maps = list[Tensor]
"""Features of a dense head: (B, C, H, W) of P3 to P7."""

Tap = Maps | Tensor
"""A post-ReLU feature that distillation reads: a dense head's maps, or a RoI head's rows (R, C), one a RoI."""

Pick = Callable[[Any], RoIs]
"""From the outputs of a dense student's head to RoIs."""


@dataclass(frozen=True)
class Scene:
    """A batch as the student sees it, and the truth about it."""

    features: list[Tensor]
    """The student's pyramid, (B, channels, H, W): P3 to P7 of a dense student, P2 to P6 of a two-stage one."""
    levels: list[Tensor]
    """P3 to P7, which dense heads look at."""
    outputs: Any
    """Of the head of a dense student; None for a two-stage one."""
    tap: Tap
    """What CKD trains: the last classification conv of a dense student, the (first stage's) last fc of a two-stage one."""
    own: RoIs | None
    """What a two-stage student itself looked at, the rows of its ``tap``; None for a dense one."""
    draw: Callable[[RoIHeadSpec], RoIs]
    """RoIs for a RoI head of this spec: sampled from a dense student's proposals; a two-stage student's are its own."""
    sizes: Tensor
    """(B, 2) unpadded (h, w)."""
    boxes: Tensor
    """(B, G, 4) float32, pixels of the network input."""
    labels: Tensor
    """(B, G) int64, -1 = padding."""
    generator: torch.Generator | None

    @property
    def truth(self) -> Truth:
        """The ground truth."""
        return Truth.of(self.boxes, self.labels)


def observe(
    student: Detector,
    x: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    labels: Tensor,
    generator: torch.Generator | None = None,
    pick: Pick | None = None,
) -> tuple[dict[str, Tensor], Scene]:
    """The student's own losses on normalised images ``x`` (B, 3, H, W), and the scene.

    Arguments as in :meth:`Trainee.forward`; ``pick`` chooses a dense student's RoIs instead of sampling its proposals.
    """
    features = student.features(x)
    if isinstance(student, TwoStageDetector):
        losses, looks = student.look(features, sizes, boxes, labels, generator)
        # P7 as a pool of P6, which is one of P5: a student without convs of its own there is not given any for an assistant.
        levels = [*features[1:], F.max_pool2d(features[-1], 1, stride=2)]
        own, tap = looks[0].rois, looks[0].outputs.taps[-1]
        return losses, Scene(features, levels, None, tap, own, lambda spec: own, sizes, boxes, labels, generator)

    assert isinstance(student, DenseDetector)
    outputs = student.head(features)
    losses = student.head.losses(outputs, sizes, boxes, labels)

    def draw(spec: RoIHeadSpec) -> RoIs:
        if pick is not None:
            return pick(outputs)
        proposals = student.head.proposals(outputs, sizes)
        return sample_rois(proposals, Truth.of(boxes, labels), spec, student.num_classes, generator)

    return losses, Scene(features, features, outputs, outputs.taps[0], None, draw, sizes, boxes, labels, generator)
