"""The frozen teacher: a detector in eval mode, without gradients, and in no module tree but its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from headkd_ray.detectors import DenseDetector, Detector, PyramidDetector, RoIs, TwoStageDetector
from headkd_ray.detectors.head_features import HeadFeatures


class FrozenTeacher:
    """A detector hidden from ``nn.Module``, so that it never reaches an optimizer or a checkpoint, or enters train mode."""

    def __init__(self, detector: PyramidDetector) -> None:
        self.detector = detector.eval().requires_grad_(False)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of device or dtype to all tensors, as ``nn.Module`` does for the student."""
        self.detector._apply(change)

    def input(self, images: Tensor, sizes: Tensor, x: Tensor, student: Detector) -> Tensor:
        """Return the teacher's input: the student's ``x`` itself, unless the teacher was trained on other pixel statistics."""
        if self.detector.spec.pixels == student.spec.pixels:
            return x
        return self.detector.normalise(images, sizes)

    @torch.no_grad()
    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Compute the teacher's pyramid levels (B, channels, H, W) of normalised images ``x`` (B, 3, H, W)."""
        return self.detector.features(x)

    @torch.no_grad()
    def head_features(self, pyramid: list[Tensor], rois: Sequence[RoIs]) -> HeadFeatures:
        """Compute the features of the teacher's head on its own ``pyramid``.

        A two-stage teacher's are those at ``rois``, stage by stage, and its RPN never runs; a dense one's cover every cell.
        """
        if isinstance(self.detector, TwoStageDetector):
            stages = zip(self.detector.roi.stages, rois, strict=True)
            return HeadFeatures.of_stages([stage(pyramid, own.boxes, own.image) for stage, own in stages])
        assert isinstance(self.detector, DenseDetector)
        return HeadFeatures.of_maps(self.detector.head.taps(pyramid))


class TeacherForward:
    """A frozen teacher on one batch, whose pyramid is computed when it is first read, and only once."""

    def __init__(self, teacher: FrozenTeacher, x: Tensor) -> None:
        """``x`` (B, 3, H, W) is the teacher's normalised input."""
        self.teacher = teacher
        self.x = x

    @cached_property
    def pyramid(self) -> list[Tensor]:
        """The pyramid levels (B, channels, H, W), finest first, without gradients."""
        return self.teacher.pyramid(self.x)

    def head_features(self, rois: Sequence[RoIs]) -> HeadFeatures:
        """Compute the features of the teacher's head; see :meth:`FrozenTeacher.head_features`."""
        return self.teacher.head_features(self.pyramid, rois)
