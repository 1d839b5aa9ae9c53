"""GFL (Li et al. 2020, Generalized Focal Loss): a dense head whose class scores also estimate the IoU of the box.

For each side of a box it predicts a distribution over distances, the mean of which is the box's.
"""

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
from headkd_ray.detectors.ops.boxes import decode_distances, encode_distances, paired_iou
from headkd_ray.detectors.ops.losses import distribution_focal_loss_sum, iou_sum, mean_over_workers, quality_focal_loss_sum
from headkd_ray.detectors.ops.matching import at_least_one_each, gather_rows, match_adaptive, row_weights
from headkd_ray.detectors.ops.proposals import flatten_cells
from headkd_ray.detectors.towers import init_dense_head, tower
from headkd_ray.job import AnchorSpec, GFLHeadSpec, GFLSpec

LARGEST = 0.1
"""Target distances are clamped to this much below ``reg_max``, so that there is always a bin above them (mmdet)."""


class GFLOutputs(NamedTuple):
    """The head's outputs, one map per level; C classes, M + 1 bins."""

    logits: list[Tensor]
    """Logits (B, C, H, W) of a score that estimates the IoU of the box with an object of the class."""
    bins: list[Tensor]
    """Logits (B, 4 * (M + 1), H, W) float32, side-major, of the distributions of the distance from the cell's point to the
    left, top, right and bottom side, in strides."""
    taps: list[list[Tensor]]
    """The features of :meth:`GFLHead.taps`."""


class GFLHead(DenseHead[GFLOutputs]):
    """A dense head with one square anchor per cell on P3 to P7; initial weights and class prior follow ``spec``."""

    spec: GFLHeadSpec
    _distances: Tensor

    def __init__(self, spec: GFLHeadSpec, in_channels: int, num_classes: int, strides: Sequence[int] = STRIDES) -> None:
        super().__init__(spec, in_channels, num_classes, strides)
        self.anchors = Anchors(AnchorSpec(base_scale=spec.base_scale, octave_scales=1, ratios=(1.0,)), strides)
        self.cls_tower = tower(in_channels, spec.channels, spec.convs, spec.norm_groups, spec.conv_bias)
        self.box_tower = tower(in_channels, spec.channels, spec.convs, spec.norm_groups, spec.conv_bias)
        self.cls_out = nn.Conv2d(spec.channels, num_classes, 3, padding=1)
        self.box_out = nn.Conv2d(spec.channels, 4 * (spec.reg_max + 1), 3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in strides)
        init_dense_head(self, spec.tower_std)
        init.prior(self.cls_out, spec.prior)
        self.register_buffer("_distances", torch.arange(spec.reg_max + 1, dtype=torch.float32), persistent=False)

    @property
    def tap_channels(self) -> list[int]:
        return [self.spec.channels] * 2

    def taps(self, features: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the post-ReLU outputs of the last classification conv and of the last box conv."""
        return [[self.cls_tower(f) for f in features], [self.box_tower(f) for f in features]]

    def forward(self, features: Sequence[Tensor]) -> GFLOutputs:
        cls_taps, box_taps = taps = self.taps(features)
        bins = [(self.box_out(t) * scale).float() for t, scale in zip(box_taps, self.scales, strict=True)]
        return GFLOutputs([self.cls_out(t) for t in cls_taps], bins, taps)

    def losses(self, outputs: GFLOutputs, truth: GroundTruth) -> Losses:
        """Compute the quality focal loss, generalised IoU loss and distribution focal loss (mmdet).

        The first is divided by the sum over images of max(1, positives), the others by the sum of their weights, which are the
        positives' greatest class scores. Both divisors are averaged over the workers of the run, and at least 1.
        """
        spec, grid = self.spec, self.anchors.grid(outputs.logits)
        valid = self.anchors.valid(grid, truth.sizes)
        matched = match_adaptive(grid.boxes, grid.counts, truth, spec.topk, valid)
        positive, certain = matched >= 0, row_weights(matched, truth)
        # Rows without a match get their own anchor as target, so that nothing below divides by 0.
        target_boxes = torch.where(positive.unsqueeze(-1), gather_rows(truth.boxes, matched), grid.boxes)
        target_labels = gather_rows(truth.labels, matched).masked_fill(~positive, -1)
        distances = encode_distances(target_boxes, grid.boxes) * spec.base_scale

        logits = torch.cat(flatten_cells(outputs.logits, self.num_classes), dim=1)
        bins = torch.cat(flatten_cells(outputs.bins, 4 * (spec.reg_max + 1)), dim=1).unflatten(-1, (4, -1))
        boxes = self.decode(self._mean(bins), grid.boxes)
        quality = paired_iou(boxes.detach(), target_boxes)[0]
        weights = logits.detach().amax(-1).float().sigmoid().masked_fill(~positive, 0.0)

        idle = not self.training  # a process without images in this step runs in eval mode
        positives = mean_over_workers(at_least_one_each(positive, truth).float(), idle).clamp(min=1)
        weight = mean_over_workers(weights.sum(), idle).clamp(min=1)
        cls = quality_focal_loss_sum(logits, target_labels, quality, certain, spec.quality_beta, self.class_weights)
        weights = weights * certain
        dfl = distribution_focal_loss_sum(bins, distances.clamp(0, spec.reg_max - LARGEST), weights.unsqueeze(-1)) / 4
        return {
            "loss_cls": cls / positives,
            "loss_box": spec.box_weight * iou_sum(boxes, target_boxes, weights, "giou") / weight,
            "loss_dfl": spec.dfl_weight * dfl / weight,
        }

    def _mean(self, bins: Tensor) -> Tensor:
        """Return the mean distances (...) of the distributions with logits ``bins`` (..., M + 1)."""
        return (bins.softmax(-1) * self._distances).sum(-1)  # not a matrix product, which autocast would round

    def box_maps(self, outputs: GFLOutputs) -> list[Tensor]:
        sides = [bins.reshape(bins.shape[0], 4, -1, *bins.shape[2:]) for bins in outputs.bins]
        return [self._mean(bins.movedim(2, -1)) for bins in sides]

    def decode(self, predicted: Tensor, reference: Tensor) -> Tensor:
        return decode_distances(predicted / self.spec.base_scale, reference)

    @torch.no_grad()
    def nearest_cells(self, outputs: GFLOutputs, boxes: Tensor) -> Tensor:
        return self.anchors.nearest(boxes, [(m.shape[-2], m.shape[-1]) for m in outputs.logits])


class GFL(DenseDetector):
    """GFL, with losses ``loss_cls``, ``loss_box`` and ``loss_dfl``."""

    spec: GFLSpec
    head: GFLHead
    head_class = GFLHead
