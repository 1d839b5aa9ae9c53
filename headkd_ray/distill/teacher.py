"""The teacher is a guest: frozen, in eval mode, and no part of any module tree but its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headkd_ray.detectors import FCOS, Detector, FasterRCNN, RetinaNet


class Guest:
    """Holds a detector where ``nn.Module`` cannot see it, so that it never reaches an optimizer, a checkpoint or train mode."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector.eval().requires_grad_(False)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Follow the student to another device or dtype."""
        self.detector._apply(change)

    def view(self, images: Tensor, sizes: Tensor, x: Tensor, student: Detector) -> Tensor:
        """The teacher's input: the student's tensor ``x`` itself, unless the teacher was trained on other pixel statistics."""
        if self.detector.spec.pixels == student.spec.pixels:
            return x
        return self.detector.normalise(images, sizes)

    @torch.no_grad()
    def features(self, x: Tensor) -> list[Tensor]:
        """The teacher's pyramid of normalised images ``x`` (B, 3, H, W)."""
        return self.detector.features(x)

    @torch.no_grad()
    def towers(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Taps of the teacher's classification and box towers on its P3 to P7 of normalised images ``x`` (B, 3, H, W).

        Only for a RetinaNet or FCOS.
        """
        assert isinstance(self.detector, (RetinaNet, FCOS))
        return self.detector.head.towers(self.detector.features(x))

    @torch.no_grad()
    def taps(self, x: Tensor, rois: Tensor, image: Tensor) -> list[Tensor]:
        """T1, T2, ...: the post-ReLU fc outputs (R, width) of the teacher's RoI head on ``rois`` (R, 4) of ``image`` (R,).

        Its RPN never runs. Only for a Faster R-CNN.
        """
        assert isinstance(self.detector, FasterRCNN)
        return self.detector.roi(self.detector.features(x), rois, image).taps
