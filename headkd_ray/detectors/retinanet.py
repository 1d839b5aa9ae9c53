"""RetinaNet (Lin et al. 2017): an anchor-based dense head on P3 to P7 with two conv towers, trained with the focal loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headkd_ray.detectors import init
from headkd_ray.detectors.base import DenseHead, Losses
from headkd_ray.detectors.dense import STRIDES, DenseDetector
from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.anchors import Anchors
from headkd_ray.detectors.ops.boxes import decode, encode
from headkd_ray.detectors.ops.losses import focal_loss_sum, l1_sum
from headkd_ray.detectors.ops.matching import at_least_one_each, gather_rows, match, row_weights
from headkd_ray.detectors.ops.proposals import flatten_cells
from headkd_ray.detectors.towers import init_dense_head, tower
from headkd_ray.job import RetinaHeadSpec, RetinaNetSpec


class RetinaOutputs(NamedTuple):
    """The head's outputs, one map per level; A anchors per cell, C classes."""

    logits: list[Tensor]
    """Class logits (B, A * C, H, W), anchor-major."""
    deltas: list[Tensor]
    """Box deltas (B, A * 4, H, W), anchor-major, with standard deviations of 1."""
    taps: list[list[Tensor]]
    """The features of :meth:`RetinaHead.taps`."""


class RetinaHead(DenseHead[RetinaOutputs]):
    """An anchor-based dense head on P3 to P7; initial weights and class prior follow ``spec``."""

    spec: RetinaHeadSpec

    def __init__(self, spec: RetinaHeadSpec, in_channels: int, num_classes: int, strides: Sequence[int] = STRIDES) -> None:
        super().__init__(spec, in_channels, num_classes, strides)
        self.anchors = Anchors(spec.anchors, strides)
        self.cls_tower = tower(in_channels, spec.channels, spec.convs)
        self.box_tower = tower(in_channels, spec.channels, spec.convs)
        self.cls_out = nn.Conv2d(spec.channels, self.anchors.per_cell * num_classes, 3, padding=1)
        self.box_out = nn.Conv2d(spec.channels, self.anchors.per_cell * 4, 3, padding=1)
        init_dense_head(self, spec.tower_std)
        init.prior(self.cls_out, spec.prior)

    @property
    def tap_channels(self) -> list[int]:
        return [self.spec.channels] * 2

    def taps(self, features: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the post-ReLU outputs of the last classification conv and of the last box conv."""
        return [[self.cls_tower(f) for f in features], [self.box_tower(f) for f in features]]

    def forward(self, features: Sequence[Tensor]) -> RetinaOutputs:
        cls_taps, box_taps = taps = self.taps(features)
        return RetinaOutputs([self.cls_out(t) for t in cls_taps], [self.box_out(t) for t in box_taps], taps)

    def losses(self, outputs: RetinaOutputs, truth: GroundTruth) -> Losses:
        """Compute the focal and the L1 loss, each divided by the sum over images of max(1, positives)."""
        grid = self.anchors.grid(outputs.logits)
        valid = self.anchors.valid(grid, truth.sizes)
        matched = match(grid.boxes, truth, self.spec.positive_iou, self.spec.negative_iou, low_quality_iou=0.0, valid=valid)
        positive, weights = matched >= 0, row_weights(matched, truth)

        target_labels = gather_rows(truth.labels, matched).masked_fill(~positive, -1)
        # Rows without a match encode their own anchor, so that not even a masked row contains log(0).
        target_boxes = torch.where(positive.unsqueeze(-1), gather_rows(truth.boxes, matched), grid.boxes)
        target_deltas = encode(target_boxes, grid.boxes)

        logits = torch.cat(flatten_cells(outputs.logits, self.num_classes), dim=1)
        deltas = torch.cat(flatten_cells(outputs.deltas, 4), dim=1)
        normaliser = at_least_one_each(positive, truth)
        cls = focal_loss_sum(logits, target_labels, weights, self.spec.focal_alpha, self.spec.focal_gamma, self.class_weights)
        return {"loss_cls": cls / normaliser, "loss_box": l1_sum(deltas, target_deltas, weights * positive) / normaliser}

    def box_maps(self, outputs: RetinaOutputs) -> list[Tensor]:
        return outputs.deltas

    def decode(self, predicted: Tensor, reference: Tensor) -> Tensor:
        return decode(predicted, reference, clamp_shrink=self.spec.clamp_shrink)

    @torch.no_grad()
    def nearest_cells(self, outputs: RetinaOutputs, boxes: Tensor) -> Tensor:
        return self.anchors.nearest(boxes, [(m.shape[-2], m.shape[-1]) for m in outputs.logits])


class RetinaNet(DenseDetector):
    """RetinaNet, with losses ``loss_cls`` and ``loss_box``."""

    spec: RetinaNetSpec
    head: RetinaHead
    head_class = RetinaHead
