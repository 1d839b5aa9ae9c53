"""FCOS (Tian et al. 2019): an anchor-free head that predicts class, box and centerness at the point of every cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headkd_ray.detectors import init
from headkd_ray.detectors.base import DenseHead, Losses
from headkd_ray.detectors.dense import STRIDES, DenseDetector
from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.anchors import AnchorGrid, Anchors
from headkd_ray.detectors.ops.boxes import decode_distances, encode_distances
from headkd_ray.detectors.ops.fixed_size import constant
from headkd_ray.detectors.ops.losses import binary_cross_entropy_sum, focal_loss_sum, iou_sum, mean_over_workers
from headkd_ray.detectors.ops.matching import gather_rows, match_points, row_weights
from headkd_ray.detectors.ops.proposals import Found, best_pairs, flatten_cells
from headkd_ray.detectors.towers import init_dense_head, tower
from headkd_ray.job import AnchorSpec, FCOSHeadSpec, FCOSSpec

MAX_LOG_DISTANCE = math.log(1e5)


class FCOSOutputs(NamedTuple):
    """The head's outputs, one map per level; C classes."""

    logits: list[Tensor]
    """Class logits (B, C, H, W)."""
    distances: list[Tensor]
    """Distances (B, 4, H, W) float32 from the cell's point to the left, top, right and bottom of its box, in strides."""
    centerness: list[Tensor]
    """Centerness logits (B, 1, H, W)."""
    taps: list[list[Tensor]]
    """The features of :meth:`FCOSHead.taps`."""


class FCOSHead(DenseHead[FCOSOutputs]):
    """An anchor-free dense head on P3 to P7; initial weights and class prior follow ``spec``."""

    spec: FCOSHeadSpec

    def __init__(self, spec: FCOSHeadSpec, in_channels: int, num_classes: int, strides: Sequence[int] = STRIDES) -> None:
        super().__init__(spec, in_channels, num_classes, strides)
        # Each cell has one square anchor with a side of one stride, whose centre is the cell's point.
        corner = spec.points == "corner"
        square = AnchorSpec(base_scale=1.0, octave_scales=1, ratios=(1.0,), rounding=corner)
        self.anchors = Anchors(square, strides, offset=0.0 if corner else 0.5)
        self.cls_tower = tower(in_channels, spec.channels, spec.convs, spec.norm_groups, spec.conv_bias)
        self.box_tower = tower(in_channels, spec.channels, spec.convs, spec.norm_groups, spec.conv_bias)
        self.cls_out = nn.Conv2d(spec.channels, num_classes, 3, padding=1)
        self.box_out = nn.Conv2d(spec.channels, 4, 3, padding=1)
        self.centerness_out = nn.Conv2d(spec.channels, 1, 3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in strides)
        init_dense_head(self, spec.tower_std)
        init.prior(self.cls_out, spec.prior)

    @property
    def tap_channels(self) -> list[int]:
        return [self.spec.channels] * 2

    def taps(self, features: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the post-ReLU outputs of the last classification conv and of the last box conv."""
        return [[self.cls_tower(f) for f in features], [self.box_tower(f) for f in features]]

    def forward(self, features: Sequence[Tensor]) -> FCOSOutputs:
        cls_taps, box_taps = taps = self.taps(features)
        raw = [self.box_out(t).float() * scale for t, scale in zip(box_taps, self.scales, strict=True)]
        if self.spec.norm_on_bbox:
            distances = [r.relu() for r in raw]
        else:
            # Clamped far above any box: an infinite exp would make gradients NaN even at points that do not count.
            distances = [r.clamp(max=MAX_LOG_DISTANCE).exp() / stride for r, stride in zip(raw, self.strides, strict=True)]
        centerness = [self.centerness_out(m) for m in (box_taps if self.spec.centerness_on_reg else cls_taps)]
        return FCOSOutputs([self.cls_out(t) for t in cls_taps], distances, centerness, taps)

    def losses(self, outputs: FCOSOutputs, truth: GroundTruth) -> Losses:
        """Compute the focal loss, the IoU loss weighted by the centerness targets, and the centerness cross entropy.

        The first and the last are divided by max(1, positives in the batch), the second by the sum of its weights. Both
        divisors are averaged over the workers of the run (mmdet), so that the gradients are those of one worker with all of
        their images. All points count, even those in the padding (mmdet).
        """
        grid = self.anchors.grid(outputs.logits)
        low, high = self._ranges(grid)
        matched = match_points(grid.boxes, truth, low, high, self.spec.center_radius)
        positive, certain = matched >= 0, row_weights(matched, truth)

        target_labels = gather_rows(truth.labels, matched).masked_fill(~positive, -1)
        # Rows without a match get their own cell as target, so that nothing below divides by 0.
        target_boxes = torch.where(positive.unsqueeze(-1), gather_rows(truth.boxes, matched), grid.boxes)
        target_distances = encode_distances(target_boxes, grid.boxes)
        target_centerness = _centerness(target_distances)
        weights = target_centerness.masked_fill(~positive, 0.0)

        logits = torch.cat(flatten_cells(outputs.logits, self.num_classes), dim=1)
        predicted = decode_distances(torch.cat(flatten_cells(outputs.distances, 4), dim=1), grid.boxes)
        centerness = torch.cat(flatten_cells(outputs.centerness, 1), dim=1).squeeze(-1)
        idle = not self.training  # a process without images in this step runs in eval mode
        positives = mean_over_workers(positive.sum().float(), idle).clamp(min=1)
        weight = mean_over_workers(weights.sum(), idle).clamp(min=1e-6)
        cls = focal_loss_sum(logits, target_labels, certain, self.spec.focal_alpha, self.spec.focal_gamma, self.class_weights)
        return {
            "loss_cls": cls / positives,
            "loss_box": iou_sum(predicted, target_boxes, weights * certain, self.spec.box_loss) / weight,
            "loss_centerness": binary_cross_entropy_sum(centerness, target_centerness, certain * positive) / positives,
        }

    def _ranges(self, grid: AnchorGrid) -> tuple[Tensor, Tensor]:
        """Return, for each point, the least and largest distance to the farthest side of a box that it may predict.

        Both are (N,), in pixels.
        """
        bounds = (0.0, *self.spec.regress_ranges, torch.inf)
        low, high = (
            torch.cat([grid.boxes.new_full((count,), bound) for count, bound in zip(grid.counts, side, strict=True)])
            for side in (bounds[:-1], bounds[1:])
        )
        return low, high

    def box_maps(self, outputs: FCOSOutputs) -> list[Tensor]:
        return outputs.distances

    def decode(self, predicted: Tensor, reference: Tensor) -> Tensor:
        return decode_distances(predicted, reference)

    @torch.no_grad()
    def nearest_cells(self, outputs: FCOSOutputs, boxes: Tensor) -> Tensor:
        """Find the point nearest to the centre of each of ``boxes`` (N, 4): (N, 4) int64 (level, y, x, 0).

        The level is the one that boxes of its size belong to by ``regress_ranges``.
        """
        reach = (boxes[:, 2:] - boxes[:, :2]).amax(1) * 0.5
        level = torch.bucketize(reach, constant(self.spec.regress_ranges, boxes))
        return self.anchors.cells_around(boxes, level, [(m.shape[-2], m.shape[-1]) for m in outputs.logits])

    @torch.no_grad()
    def candidates(self, outputs: FCOSOutputs) -> list[Found]:
        """Return the best pairs of point and class of each level, scored as ``spec.score`` says."""
        grid = self.anchors.grid(outputs.logits)
        rules, root = self.spec.postprocess, self.spec.score == "sqrt"
        found, offset = [], 0
        for logits, distances, centerness, count in zip(
            flatten_cells(outputs.logits, self.num_classes),
            flatten_cells(outputs.distances, 4),
            flatten_cells(outputs.centerness, 1),
            grid.counts,
            strict=True,
        ):
            quality = centerness.squeeze(-1).float().sigmoid()
            point, score, label = best_pairs(logits, rules.pre_nms, quality if root else None)
            boxes = self.boxes_at(distances, point, grid.boxes[offset : offset + count])
            found.append(Found(boxes, score, score if root else score * quality.gather(1, point), label))
            offset += count
        return found


def _centerness(distances: Tensor) -> Tensor:
    """Return the centerness (...) of ``distances`` (..., 4) above 0.

    It is the geometric mean of the ratios of the nearer to the farther side along each axis.
    """
    left, top, right, bottom = distances.unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (across * down).sqrt()


class FCOS(DenseDetector):
    """FCOS, with losses ``loss_cls``, ``loss_box`` and ``loss_centerness``."""

    spec: FCOSSpec
    head: FCOSHead
    head_class = FCOSHead
