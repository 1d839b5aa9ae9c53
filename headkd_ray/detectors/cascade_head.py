"""Cascade R-CNN's RoI head: box heads in a row, each on the boxes that the one before it refined."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from headkd_ray.detectors.boxes import clip, decode
from headkd_ray.detectors.matching import Truth
from headkd_ray.detectors.nms import pack
from headkd_ray.detectors.proposals import Detections, Proposals
from headkd_ray.detectors.roi_head import Look, RoIHead, RoIOutputs, deltas_of
from headkd_ray.detectors.rois import RoIs, sample_rois
from headkd_ray.job import CascadeHeadSpec


class CascadeHead(nn.Module):
    """The heads of ``spec.stages``, each as a :class:`RoIHead` of its own, with the same methods around them."""

    stages: Sequence[RoIHead]
    """The heads that look one after the other."""

    def __init__(self, spec: CascadeHeadSpec, in_channels: int, num_classes: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        self.strides = tuple(strides)
        heads = nn.ModuleList(RoIHead(stage, in_channels, num_classes, strides) for stage in spec.stages)
        self.stages = cast("Sequence[RoIHead]", heads)

    @property
    def tap_channels(self) -> list[int]:
        """Width of each tap: the fully connected layers of the first stage, then of the next."""
        return [width for stage in self.stages for width in stage.tap_channels]

    @property
    def lead_channels(self) -> int:
        """Width of the tap that CKD reads, the first stage's last."""
        return self.stages[0].lead_channels

    def looks(
        self, features: Sequence[Tensor], rois: RoIs, truth: Truth, sizes: Tensor, generator: torch.Generator | None = None
    ) -> list[Look]:
        """What a training step sees, a look for each stage: the first at ``rois``, any other at what the one before it saw,
        refined, matched with ``truth`` and sampled again.

        ``sizes`` (B, 2) unpadded (h, w); ``generator`` draws the samples. No gradient flows from stage to stage.
        """
        looks = self.stages[0].looks(features, rois, truth, sizes)
        for before, stage in pairwise(self.stages):
            rois = sample_rois(refine(before, looks[-1], sizes), truth, stage.spec, self.num_classes, generator)
            looks += stage.looks(features, rois, truth, sizes)
        return looks

    def losses(self, looks: Sequence[Look]) -> dict[str, Tensor]:
        """``s0_cls``, ``s0_box``, ``s1_cls``, ...: each stage's as :meth:`RoIHead.losses`, times its weight."""
        stages = enumerate(zip(self.stages, looks, self.spec.weights, strict=True))
        return {
            f"s{i}_{name}": weight * loss for i, (stage, look, weight) in stages for name, loss in stage.losses([look]).items()
        }

    @torch.no_grad()
    def detect(self, features: Sequence[Tensor], rois: Tensor, image: Tensor, sizes: Tensor) -> Detections:
        """Detections at test settings from ``rois`` (R, 4) of images ``image`` (R,): boxes are the last stage's, scores what
        all stages said, each about the RoI as it came to it; ``sizes`` (B, 2) unpadded (h, w)."""
        outputs = self.stages[0](features, rois, image)
        logits = [outputs.logits]
        for before, stage in pairwise(self.stages):
            rois = moved(before, outputs, rois, image, sizes)
            outputs = stage(features, rois, image)
            logits.append(outputs.logits)
        return self.stages[-1].conclude(RoIOutputs([], self._average(logits), outputs.deltas), rois, image, sizes)

    def _average(self, logits: Sequence[Tensor]) -> Tensor:
        """(R, C + 1) float32 logits whose softmax is the score, from those of the stages."""
        each = torch.stack([stage.float() for stage in logits])
        if self.spec.average == "logits":
            return each.mean(0)
        return each.log_softmax(-1).logsumexp(0)  # the log of the summed scores; the softmax divides by their number


@torch.no_grad()
def refine(head: RoIHead, look: Look, sizes: Tensor) -> Proposals:
    """The RoIs of a look of ``head`` as it would move them, in their order, each with the cell that it came from.

    Ground-truth boxes are left out: they are added again when the next stage matches. A score is 1, since RoIs have none.
    """
    rois = look.rois
    kept = rois.from_proposal
    boxes = moved(head, look.outputs, rois.boxes, rois.image, sizes, rois.labels)[kept]
    fields = {"boxes": (boxes, 0), "cells": (rois.cells[kept], -1)}
    valid, packed = pack(rois.image[kept], len(sizes), len(boxes), fields)
    return Proposals(packed["boxes"], valid.float(), packed["cells"], valid)


@torch.no_grad()
def moved(
    head: RoIHead, outputs: RoIOutputs, rois: Tensor, image: Tensor, sizes: Tensor, labels: Tensor | None = None
) -> Tensor:
    """(R, 4): ``rois`` (R, 4) of images ``image`` (R,) moved by the deltas of ``head``'s ``outputs``, clipped to ``sizes``.

    A class-specific head moves a RoI as an object of its class in ``labels`` (R,), background or unlabelled ones as one of
    the likeliest class.
    """
    likeliest = outputs.logits[:, :-1].argmax(1)
    labels = likeliest if labels is None else torch.where(labels < head.num_classes, labels, likeliest)
    boxes = decode(deltas_of(outputs, labels).float(), rois, head.spec.stds, head.spec.clamp_shrink)
    return clip(boxes.unsqueeze(1), sizes[image]).squeeze(1)
