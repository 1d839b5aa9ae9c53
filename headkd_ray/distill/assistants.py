"""TF-HEAD's assistants: heads of other kinds on the student's pyramid that learn from labels and give CKD its targets.

Whoever adds a detector kind adds its head to the detectors room and a line to ``build.py``: dense heads and RoI heads are all
there is here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from headkd_ray.detectors import FCOSHead, Proposals, RetinaHead, RoIHead
from headkd_ray.detectors.matching import Truth
from headkd_ray.detectors.roi_head import Look
from headkd_ray.detectors.rois import sample_rois
from headkd_ray.distill.ckd import CKD, level_errors


class Scene(NamedTuple):
    """What a student made of a batch, and the truth about it."""

    features: list[Tensor]
    """P3 to P7, (B, channels, H, W)."""
    taps: list[Tensor]
    """(B, width, H, W): post-ReLU output of the student's last classification conv on each level."""
    proposals: Proposals | None
    """The student's; None if no assistant needs them."""
    sizes: Tensor
    """(B, 2) unpadded (h, w)."""
    boxes: Tensor
    """(B, G, 4) float32, pixels of the network input."""
    labels: Tensor
    """(B, G) int64, -1 = padding."""
    generator: torch.Generator | None


class Advice(NamedTuple):
    """What an assistant has to say about a scene."""

    losses: dict[str, Tensor]
    """Its own ground-truth losses, by short name; unweighted."""
    ckd: Tensor
    """Distance of the student's adapted features from the assistant's; unweighted. The assistant gets no gradient from it."""


class DenseAssistant(nn.Module):
    """A dense head; its last classification conv teaches the student's, through one 1x1 conv that all levels share."""

    def __init__(self, head: FCOSHead | RetinaHead, width: int) -> None:
        """``width``: channels of the student's taps."""
        super().__init__()
        self.head = head
        self.adapter = nn.Conv2d(width, head.spec.channels, 1)

    def forward(self, scene: Scene) -> Advice:
        outputs = self.head(scene.features)
        losses = self.head.losses(outputs, scene.sizes, scene.boxes, scene.labels)
        ckd = level_errors(self.adapter, scene.taps, outputs.taps)
        return Advice({name.removeprefix("loss_"): loss for name, loss in losses.items()}, ckd)


class RoIAssistant(nn.Module):
    """An R-CNN head on the student's proposals; its last fc teaches the student's last classification conv at their cells."""

    def __init__(self, head: RoIHead, ckd: CKD) -> None:
        super().__init__()
        self.head = head
        self.ckd = ckd

    def forward(self, scene: Scene) -> Advice:
        assert scene.proposals is not None
        truth = Truth.of(scene.boxes, scene.labels)
        rois = sample_rois(scene.proposals, truth, self.head.spec, self.head.num_classes, scene.generator)
        outputs = self.head(scene.features, rois.boxes, rois.image)
        rows = self.ckd(scene.taps, rois)
        return Advice(self.head.losses([Look(rois, outputs)]), self.ckd.loss(rows, outputs.taps[-1], rois))
