"""Cascade R-CNN (Cai & Vasconcelos 2018): a sequence of box heads, each on the boxes that the one before it refined."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from headkd_ray.detectors.base import Losses, RoIHead, StageOutput
from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.boxes import clip, decode
from headkd_ray.detectors.ops.fixed_size import fixed_size
from headkd_ray.detectors.ops.nms import pack
from headkd_ray.detectors.ops.proposals import Proposals
from headkd_ray.detectors.ops.rois import RoIs, sample_rois
from headkd_ray.detectors.roi_head import BoxHead, BoxOutputs, deltas_of
from headkd_ray.detectors.two_stage import TwoStageDetector
from headkd_ray.job import CascadeHeadSpec, CascadeRCNNSpec


class CascadeHead(RoIHead):
    """A sequence of box heads, a :class:`BoxHead` for each of ``spec.stages``."""

    spec: CascadeHeadSpec

    def __init__(self, spec: CascadeHeadSpec, in_channels: int, num_classes: int, strides: Sequence[int]) -> None:
        super().__init__(spec, in_channels, num_classes, strides)
        heads = nn.ModuleList(BoxHead(stage, in_channels, num_classes, strides) for stage in spec.stages)
        self.stages = cast("Sequence[BoxHead]", heads)

    def stage_outputs(
        self, features: Sequence[Tensor], rois: RoIs, truth: GroundTruth, generator: torch.Generator | None = None
    ) -> list[StageOutput]:
        outputs = self.stages[0].stage_outputs(features, rois, truth)
        for before, stage in pairwise(self.stages):
            rois = sample_rois(refine(before, outputs[-1], truth.sizes), truth, stage.spec, self.num_classes, generator)
            outputs += stage.stage_outputs(features, rois, truth)
        return outputs

    def losses(self, outputs: Sequence[StageOutput]) -> Losses:
        """Return ``s0_cls``, ``s0_box``, ``s1_cls``, ...: each stage's :meth:`BoxHead.losses` times its weight."""
        stages = enumerate(zip(self.stages, outputs, self.spec.weights, strict=True))
        return {
            f"s{i}_{name}": weight * loss for i, (stage, said, weight) in stages for name, loss in stage.losses([said]).items()
        }

    def final(self, features: Sequence[Tensor], boxes: Tensor, image: Tensor, sizes: Tensor) -> tuple[BoxOutputs, Tensor]:
        """Run all stages: deltas are the last one's, logits average all stages, each at the RoI that reached it."""
        outputs = self.stages[0](features, boxes, image)
        logits = [outputs.logits]
        for before, stage in pairwise(self.stages):
            boxes = moved(before, outputs, boxes, image, sizes)
            outputs = stage(features, boxes, image)
            logits.append(outputs.logits)
        return BoxOutputs([], self._average(logits), outputs.deltas), boxes

    def _average(self, logits: Sequence[Tensor]) -> Tensor:
        """Combine the stages' logits into (R, C + 1) float32 ones whose softmax is the score."""
        each = torch.stack([stage.float() for stage in logits])
        if self.spec.average == "logits":
            return each.mean(0)
        return each.log_softmax(-1).logsumexp(0)  # the log of the summed scores; the softmax normalises the sum


@torch.no_grad()
def refine(head: BoxHead, said: StageOutput, sizes: Tensor) -> Proposals:
    """Move the RoIs of ``said``, an output of ``head``, by its deltas, keeping their order and the cells they came from.

    Ground-truth boxes are left out: the next stage's matching adds them again. All scores are 1, since RoIs have none.
    """
    rois = said.rois
    kept = rois.from_proposal
    boxes = moved(head, said.outputs, rois.boxes, rois.image, sizes, rois.labels)
    if fixed_size(boxes):
        boxes, cells, valid = (rows.unflatten(0, (len(sizes), -1)) for rows in (boxes, rois.cells, kept))
        return Proposals(boxes, valid.float(), cells.masked_fill(~valid.unsqueeze(-1), -1), valid)
    boxes = boxes[kept]
    fields = {"boxes": (boxes, 0), "cells": (rois.cells[kept], -1)}
    valid, packed = pack(rois.image[kept], len(sizes), len(boxes), fields)
    return Proposals(packed["boxes"], valid.float(), packed["cells"], valid)


@torch.no_grad()
def moved(
    head: BoxHead, outputs: BoxOutputs, rois: Tensor, image: Tensor, sizes: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Move ``rois`` (R, 4) of images ``image`` (R,) by the deltas of ``head``'s ``outputs``, and clip them to ``sizes``.

    A class-specific head uses the deltas of a RoI's class in ``labels`` (R,), or of its most likely class if it is background
    or unlabelled.
    """
    classes = outputs.logits[:, :-1].argmax(1)
    if labels is not None:
        classes = torch.where((labels >= 0) & (labels < head.num_classes), labels, classes)
    boxes = decode(deltas_of(outputs, classes).float(), rois, head.spec.stds, head.spec.clamp_shrink)
    return clip(boxes.unsqueeze(1), sizes[image]).squeeze(1)


class CascadeRCNN(TwoStageDetector):
    """Cascade R-CNN.

    Its losses are ``loss_rpn_cls``, ``loss_rpn_box`` and, for each stage, ``loss_roi_s0_cls``, ``loss_roi_s0_box``, ...
    """

    spec: CascadeRCNNSpec
    roi: CascadeHead
    head_class = CascadeHead
