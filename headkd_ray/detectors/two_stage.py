"""The base class of two-stage detectors: an RPN on P2 to P6 and a RoI head on P2 to P5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, TypeGuard

import torch
from torch import Tensor

from headkd_ray.detectors.base import Detector, Losses, PyramidDetector, RoIHead, Rules, StageOutput
from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.proposals import Detections
from headkd_ray.detectors.ops.rois import flatten, sample_rois
from headkd_ray.detectors.rpn import RPN, STRIDES
from headkd_ray.job import TwoStageDetectorSpec

ROI_LEVELS = 4
"""Number of levels, the finest ones, from which a RoI head pools: P2 to P5 here, P3 to P6 as a dense student's assistant."""


class TwoStageDetector(PyramidDetector):
    """A backbone, an FPN on C2 to C5, an RPN and a RoI head; a subclass names the head's class."""

    spec: TwoStageDetectorSpec
    strides = STRIDES
    roi: RoIHead
    head_class: ClassVar[type[RoIHead]]

    def __init__(self, spec: TwoStageDetectorSpec, num_classes: int) -> None:
        super().__init__(spec, num_classes)
        self.rpn = RPN(spec.rpn, spec.neck.channels)
        self.roi = self.head_class(spec.roi, spec.neck.channels, num_classes, self.strides[:ROI_LEVELS])

    @property
    def detection_head(self) -> RoIHead:
        return self.roi

    def losses(self, features: list[Tensor], truth: GroundTruth, generator: torch.Generator | None = None) -> Losses:
        """Compute ``loss_rpn_cls``, ``loss_rpn_box`` and the RoI head's losses as ``loss_roi_*``."""
        return self.losses_and_stages(features, truth, generator)[0]

    def losses_and_stages(
        self, features: list[Tensor], truth: GroundTruth, generator: torch.Generator | None = None
    ) -> tuple[Losses, list[StageOutput]]:
        """Compute the losses, and return them with the outputs of each stage of the RoI head."""
        outputs = self.rpn(features)
        losses = self.rpn.losses(outputs, truth, generator)
        proposals = self.rpn.proposals(outputs, truth.sizes)
        rois = sample_rois(proposals, truth, self.roi.stages[0].spec, self.num_classes, generator)
        stages = self.roi.stage_outputs(features, rois, truth, generator)
        return losses | {f"loss_roi_{name}": loss for name, loss in self.roi.losses(stages).items()}, stages

    @torch.no_grad()
    def detect(self, x: Tensor, sizes: Tensor) -> Detections:
        features = self.features(x)
        boxes, image = flatten(self.rpn.proposals(self.rpn(features), sizes))
        return self.roi.detect(features, boxes, image, sizes)

    @property
    def rules(self) -> Rules:
        kept = self.roi.stages[-1].spec.postprocess
        return Rules(kept.score, kept.nms_iou, kept.max_detections)

    def class_rows(self) -> Mapping[str, Tensor]:
        names = {module: name for name, module in self.named_modules()}
        classes = torch.arange(self.num_classes + 1)  # background last
        layers = {}
        for stage in self.roi.stages:
            layers[f"{names[stage]}.cls_out"] = classes
            if not stage.spec.class_agnostic:
                layers[f"{names[stage]}.box_out"] = classes[:-1].repeat_interleave(4)  # the four deltas of a box
        return {f"{layer}.{tensor}": rows for layer, rows in layers.items() for tensor in ("weight", "bias")}


def answers_about_rois(detector: Detector) -> TypeGuard[TwoStageDetector]:
    """Return whether ``detector``'s outputs for a RoI depend on that RoI alone: two-stage, with a single-stage head."""
    return isinstance(detector, TwoStageDetector) and len(detector.roi.stages) == 1
