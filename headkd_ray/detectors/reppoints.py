"""RepPoints (Yang et al. 2019): nine points per cell, at which deformable convs read features to refine and classify them.

The box of a cell follows from the mean and spread of its points (the paper's moment variant). Points are (y, x) pairs, like
the offsets of deformable convs, relative to the cell's own point (x * stride, y * stride), in units of the stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from headkd_ray.detectors import init
from headkd_ray.detectors.base import DenseHead, Losses
from headkd_ray.detectors.dense import STRIDES, DenseDetector
from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.anchors import AnchorGrid, Anchors
from headkd_ray.detectors.ops.boxes import decode_distances, encode_distances
from headkd_ray.detectors.ops.losses import focal_loss_sum, l1_sum
from headkd_ray.detectors.ops.matching import at_least_one_each, gather_rows, match, match_nearest, row_weights
from headkd_ray.detectors.ops.proposals import flatten_cells
from headkd_ray.detectors.towers import init_dense_head, tower
from headkd_ray.job import AnchorSpec, RepPointsHeadSpec, RepPointsSpec

KERNEL = 3
"""Kernel size of the deformable convs; each of its weights reads at one point."""

POINTS = KERNEL * KERNEL


class RepPointsOutputs(NamedTuple):
    """The head's outputs, one map per level; C classes."""

    logits: list[Tensor]
    """Class logits (B, C, H, W)."""
    initial: list[Tensor]
    """Initial points (B, 2 * POINTS, H, W) float32, y before x, in strides from the cell's own point."""
    refined: list[Tensor]
    """Refined points (B, 2 * POINTS, H, W) float32; no gradient flows from them to ``initial``."""
    taps: list[list[Tensor]]
    """The features of :meth:`RepPointsHead.taps`."""


class RepPointsHead(DenseHead[RepPointsOutputs]):
    """A dense head of point sets on P3 to P7; initial weights and class prior follow ``spec``."""

    spec: RepPointsHeadSpec
    _rest: Tensor

    def __init__(self, spec: RepPointsHeadSpec, in_channels: int, num_classes: int, strides: Sequence[int] = STRIDES) -> None:
        super().__init__(spec, in_channels, num_classes, strides)
        # Each cell has one square anchor with a side of one stride, whose centre is the cell's own point.
        self.anchors = Anchors(AnchorSpec(base_scale=1.0, octave_scales=1, ratios=(1.0,)), strides)
        width = spec.point_channels
        self.cls_tower = tower(in_channels, spec.channels, spec.convs, spec.norm_groups, spec.conv_bias)
        self.box_tower = tower(in_channels, spec.channels, spec.convs, spec.norm_groups, spec.conv_bias)
        self.init_conv = nn.Conv2d(spec.channels, width, 3, padding=1)
        self.init_out = nn.Conv2d(width, 2 * POINTS, 1)
        self.cls_conv = DeformConv2d(spec.channels, width, KERNEL, padding=KERNEL // 2, bias=False)
        self.cls_out = nn.Conv2d(width, num_classes, 1)
        self.refine_conv = DeformConv2d(spec.channels, width, KERNEL, padding=KERNEL // 2, bias=False)
        self.refine_out = nn.Conv2d(width, 2 * POINTS, 1)
        self.moment_transfer = nn.Parameter(torch.zeros(2))
        """Log factors from the points' standard deviations to half the box's width and height."""

        init_dense_head(self, spec.tower_std)
        if spec.tower_std is None:
            init.kaiming(self.init_conv)
        init.prior(self.cls_out, spec.prior)
        for conv in (self.cls_conv, self.refine_conv):
            nn.init.kaiming_uniform_(conv.weight, nonlinearity="relu")
        side = torch.arange(KERNEL, dtype=torch.float32) - KERNEL // 2
        rest = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).reshape(1, 2 * POINTS, 1, 1)
        # The points at which a plain conv reads; a deformable conv's offsets are relative to them.
        self.register_buffer("_rest", rest, persistent=False)

    @property
    def tap_channels(self) -> list[int]:
        return [self.spec.channels] * 2 + [self.spec.point_channels] * 3

    def taps(self, features: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the post-ReLU outputs of five convs: the last ones of the classification tower and of the points' tower, the
        one before the initial points, and the deformable ones that classify and refine."""
        return self._read(features)[0]

    def forward(self, features: Sequence[Tensor]) -> RepPointsOutputs:
        taps, initial = self._read(features)
        *_, classify, refine = taps
        refined = [self.refine_out(t).float() + points.detach() for t, points in zip(refine, initial, strict=True)]
        return RepPointsOutputs([self.cls_out(t) for t in classify], initial, refined, taps)

    def _read(self, features: Sequence[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Compute the taps and the initial points, (B, 2 * POINTS, H, W) float32 per level."""
        cls_taps, box_taps = [self.cls_tower(f) for f in features], [self.box_tower(f) for f in features]
        init_taps = [self.init_conv(t).relu() for t in box_taps]
        initial = [self.init_out(t).float() for t in init_taps]
        offsets = [_damp(points, self.spec.gradient_mul) - self._rest for points in initial]
        classify = [_deform(self.cls_conv, t, offset) for t, offset in zip(cls_taps, offsets, strict=True)]
        refine = [_deform(self.refine_conv, t, offset) for t, offset in zip(box_taps, offsets, strict=True)]
        return [cls_taps, box_taps, init_taps, classify, refine], initial

    def distances(self, points: Tensor) -> Tensor:
        """Turn ``points`` (B, 2 * POINTS, H, W) into boxes: mean +- factor x standard deviation along each axis.

        Returns the distances (B, 4, H, W) from the cell's own point to the left, top, right and bottom side, in strides; they
        are negative where the point lies outside.
        """
        y, x = points.reshape(points.shape[0], POINTS, 2, *points.shape[2:]).unbind(2)
        factor = _damp(self.moment_transfer, self.spec.moment_mul).exp()
        half_width, half_height = x.std(1) * factor[0], y.std(1) * factor[1]  # std's gradient is 0, not NaN, without spread
        x, y = x.mean(1), y.mean(1)
        return torch.stack([half_width - x, half_height - y, half_width + x, half_height + y], dim=1)

    def losses(self, outputs: RepPointsOutputs, truth: GroundTruth) -> Losses:
        """Compute the focal loss and the smooth L1 losses of the initial and the refined points' boxes.

        A ground-truth box is the initial target of the cell nearest to it; targets of refinement and classification follow from
        the IoU of the initial boxes. Each loss is divided by the sum over images of max(1, positives of its stage).
        """
        spec = self.spec
        grid = self.anchors.grid(outputs.logits)
        valid = self.anchors.valid(grid, truth.sizes)
        initial, refined = (
            torch.cat(flatten_cells([self.distances(points) for points in stage], 4), dim=1)
            for stage in (outputs.initial, outputs.refined)
        )
        nearest = match_nearest(grid.boxes, truth, spec.base_scale, valid)
        candidates = decode_distances(initial.detach(), grid.boxes)
        matched = match(candidates, truth, spec.positive_iou, spec.negative_iou, low_quality_iou=0.0, valid=valid)

        target_labels = gather_rows(truth.labels, matched).masked_fill(matched < 0, -1)
        logits = torch.cat(flatten_cells(outputs.logits, self.num_classes), dim=1)
        weights = row_weights(matched, truth)
        cls = focal_loss_sum(logits, target_labels, weights, spec.focal_alpha, spec.focal_gamma, self.class_weights)
        return {
            "loss_cls": cls / at_least_one_each(matched >= 0, truth),
            "loss_init": spec.init_weight * self._point_loss(initial, nearest, truth, grid),
            "loss_refine": spec.refine_weight * self._point_loss(refined, matched, truth, grid),
        }

    def _point_loss(self, distances: Tensor, matched: Tensor, truth: GroundTruth, grid: AnchorGrid) -> Tensor:
        """Return the smooth L1 loss of ``distances`` (B, N, 4) to the boxes of ``truth`` that are ``matched`` (B, N)."""
        scale = self.spec.base_scale
        target = encode_distances(gather_rows(truth.boxes, matched), grid.boxes)
        weights = row_weights(matched, truth) * (matched >= 0)
        total = l1_sum(distances / scale, target / scale, weights, self.spec.smooth_l1_beta)
        return total / at_least_one_each(matched >= 0, truth)

    def box_maps(self, outputs: RepPointsOutputs) -> list[Tensor]:
        return [self.distances(points) for points in outputs.refined]

    def decode(self, predicted: Tensor, reference: Tensor) -> Tensor:
        return decode_distances(predicted, reference)

    @torch.no_grad()
    def nearest_cells(self, outputs: RepPointsOutputs, boxes: Tensor) -> Tensor:
        """Find the point nearest to the centre of each of ``boxes`` (N, 4): (N, 4) int64 (level, y, x, 0).

        The level is the one that boxes of its size belong to; see ``match_nearest``.
        """
        sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6) / (self.spec.base_scale * self.strides[0])
        level = sides.log2().mean(-1).floor().long().clamp(0, len(self.strides) - 1)
        return self.anchors.cells_around(boxes, level, [(m.shape[-2], m.shape[-1]) for m in outputs.logits])


def _damp(value: Tensor, share: float) -> Tensor:
    """Return ``value`` with its gradient scaled by ``share``."""
    return value.detach() * (1 - share) + value * share


def _deform(conv: DeformConv2d, features: Tensor, offsets: Tensor) -> Tensor:
    """Apply the deformable conv and a ReLU, in float32 because bfloat16 would round the positions at which it reads."""
    return conv(features.float(), offsets).relu()


class RepPoints(DenseDetector):
    """RepPoints, with losses ``loss_cls``, ``loss_init`` and ``loss_refine``."""

    spec: RepPointsSpec
    head: RepPointsHead
    head_class = RepPointsHead
