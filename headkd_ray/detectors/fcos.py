"""FCOS (Tian et al. 2019): a class, a box and a centerness for the point of every cell of P3 to P7."""

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
from headkd_ray.detectors.ops.losses import binary_cross_entropy_sum, focal_loss_sum, iou_sum
from headkd_ray.detectors.ops.matching import gather_rows, match_points
from headkd_ray.detectors.ops.proposals import Detections, Found, best_pairs, conclude, flatten_cells
from headkd_ray.detectors.towers import init_dense_head, tower
from headkd_ray.job import AnchorSpec, FCOSHeadSpec, FCOSSpec

MAX_LOG_DISTANCE = math.log(1e5)


class FCOSOutputs(NamedTuple):
    """What the head says about each level; C classes."""

    logits: list[Tensor]
    """(B, C, H, W)."""
    distances: list[Tensor]
    """(B, 4, H, W) float32: from the cell's point to the left, top, right and bottom of its box, in units of the stride."""
    centerness: list[Tensor]
    """(B, 1, H, W) logits."""
    taps: list[list[Tensor]]
    """As :meth:`FCOSHead.taps`."""


class FCOSHead(DenseHead[FCOSOutputs]):
    """Dense head of points on P3 to P7; init and class prior as in ``spec``."""

    spec: FCOSHeadSpec

    def __init__(self, spec: FCOSHeadSpec, in_channels: int, num_classes: int, strides: Sequence[int] = STRIDES) -> None:
        super().__init__(spec, in_channels, num_classes, strides)
        # A point is the centre of the one square anchor, of the stride's size, that its cell has.
        corner = spec.points == "corner"
        square = AnchorSpec(base_scale=1.0, octave_scales=1, ratios=(1.0,), rounding=corner)
        self.anchors = Anchors(square, strides, offset=0.0 if corner else 0.5)
        self.cls_tower = tower(in_channels, spec.channels, spec.convs, spec.norm_groups)
        self.box_tower = tower(in_channels, spec.channels, spec.convs, spec.norm_groups)
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
        """The outputs of the last classification conv and of the last box conv, both post-ReLU."""
        return [[self.cls_tower(f) for f in features], [self.box_tower(f) for f in features]]

    def forward(self, features: Sequence[Tensor]) -> FCOSOutputs:
        cls_taps, box_taps = taps = self.taps(features)
        raw = [self.box_out(t).float() * scale for t, scale in zip(box_taps, self.scales, strict=True)]
        if self.spec.norm_on_bbox:
            distances = [r.relu() for r in raw]
        else:
            # Bounded far above any box: where a point does not count, an infinite exp would still make its gradient NaN.
            distances = [r.clamp(max=MAX_LOG_DISTANCE).exp() / stride for r, stride in zip(raw, self.strides, strict=True)]
        centerness = [self.centerness_out(m) for m in (box_taps if self.spec.centerness_on_reg else cls_taps)]
        return FCOSOutputs([self.cls_out(t) for t in cls_taps], distances, centerness, taps)

    def losses(self, outputs: FCOSOutputs, truth: GroundTruth) -> Losses:
        """Focal loss, IoU loss weighted with the centerness targets, cross entropy of the centerness.

        The first and the last are divided by max(1, positives in the batch), the second by its weights' sum, on each worker by
        itself (mmdet's FCOS averages these over workers). All points count, also those in the padding (mmdet).
        """
        grid = self.anchors.grid(outputs.logits)
        low, high = self._ranges(grid)
        matched = match_points(grid.boxes, truth, low, high, self.spec.center_radius)
        positive = matched >= 0

        target_labels = gather_rows(truth.labels, matched).masked_fill(~positive, -1)
        # Rows without a match have their own cell for a target, so that nothing below divides by 0.
        target_boxes = torch.where(positive.unsqueeze(-1), gather_rows(truth.boxes, matched), grid.boxes)
        target_distances = encode_distances(target_boxes, grid.boxes)
        target_centerness = _centerness(target_distances)
        weights = target_centerness.masked_fill(~positive, 0.0)

        logits = torch.cat(flatten_cells(outputs.logits, self.num_classes), dim=1)
        predicted = decode_distances(torch.cat(flatten_cells(outputs.distances, 4), dim=1), grid.boxes)
        centerness = torch.cat(flatten_cells(outputs.centerness, 1), dim=1).squeeze(-1)
        positives = positive.sum().clamp(min=1)
        everywhere = torch.ones_like(positive)
        cls = focal_loss_sum(logits, target_labels, everywhere, self.spec.focal_alpha, self.spec.focal_gamma)
        return {
            "loss_cls": cls / positives,
            "loss_box": iou_sum(predicted, target_boxes, weights, self.spec.box_loss) / weights.sum().clamp(min=1e-6),
            "loss_centerness": binary_cross_entropy_sum(centerness, target_centerness, positive) / positives,
        }

    def _ranges(self, grid: AnchorGrid) -> tuple[Tensor, Tensor]:
        """(N,) least and (N,) largest distance, in pixels, from each point to the farthest side of a box it may answer for."""
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
        """(N, 4) int64 (level, y, x, 0): the point nearest to the centre of each of ``boxes`` (N, 4), on the level that
        boxes of its size belong to by ``regress_ranges``."""
        reach = (boxes[:, 2:] - boxes[:, :2]).amax(1) * 0.5
        level = torch.bucketize(reach, boxes.new_tensor(self.spec.regress_ranges))
        return self.anchors.cells_around(boxes, level, [(m.shape[-2], m.shape[-1]) for m in outputs.logits])

    @torch.no_grad()
    def detect(self, outputs: FCOSOutputs, sizes: Tensor) -> Detections:
        """Detections at test settings, scored by class probability and centerness as ``spec.score`` says."""
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
        return conclude(found, sizes, rules, self.num_classes)


def _centerness(distances: Tensor) -> Tensor:
    """(...) geometric mean of the ratios of the nearer to the farther side, of ``distances`` (..., 4) above 0."""
    left, top, right, bottom = distances.unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (across * down).sqrt()


class FCOS(DenseDetector):
    """Losses: ``loss_cls``, ``loss_box``, ``loss_centerness``."""

    spec: FCOSSpec
    head: FCOSHead
    head_class = FCOSHead
