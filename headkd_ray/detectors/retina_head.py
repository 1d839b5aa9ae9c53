"""RetinaNet's dense head: two conv towers on every pyramid level, focal loss, and proposals for an R-CNN assistant."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headkd_ray.detectors import init
from headkd_ray.detectors.anchors import Anchors, padded_extents, valid_anchors
from headkd_ray.detectors.boxes import decode, encode
from headkd_ray.detectors.losses import focal_loss_sum, l1_sum
from headkd_ray.detectors.matching import Truth, gather_rows, match
from headkd_ray.detectors.proposals import Detections, Found, Proposals, best_pairs, conclude, flatten_cells, propose
from headkd_ray.job import RetinaHeadSpec

STRIDES = (8, 16, 32, 64, 128)
"""Pixels a cell of P3 to P7."""


class RetinaOutputs(NamedTuple):
    """What the head says about each level; A anchors a cell, C classes."""

    logits: list[Tensor]
    """(B, A * C, H, W), anchor-major."""
    deltas: list[Tensor]
    """(B, A * 4, H, W), anchor-major, stds 1."""
    taps: list[list[Tensor]]
    """What distillation reads; see :meth:`RetinaHead.taps`."""


def tower(in_channels: int, channels: int, depth: int, norm_groups: int | None = None) -> nn.Sequential:
    """``depth`` times 3x3 conv, GroupNorm (unless ``norm_groups`` is None) and ReLU."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Conv2d(in_channels if i == 0 else channels, channels, 3, padding=1))
        if norm_groups is not None:
            layers.append(nn.GroupNorm(norm_groups, channels))
        layers.append(nn.ReLU())  # not in-place: the last output is a tap, and FPN maps feed two towers
    return nn.Sequential(*layers)


def init_dense_head(head: nn.Module, tower_std: float | None) -> None:
    """Output convs from N(0, 0.01); tower convs from N(0, tower_std), or by He et al. (2015) when it is None."""
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d):
            if "tower" not in name:
                init.normal(module, std=0.01)
            elif tower_std is None:
                init.kaiming(module)
            else:
                init.normal(module, std=tower_std)


class RetinaHead(nn.Module):
    """Dense head on P3 to P7 with ``num_classes`` sigmoid classes; init and class prior as in ``spec``."""

    def __init__(self, spec: RetinaHeadSpec, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        self.anchors = Anchors(spec.anchors, STRIDES)
        self.cls_tower = tower(in_channels, spec.channels, spec.convs)
        self.box_tower = tower(in_channels, spec.channels, spec.convs)
        self.cls_out = nn.Conv2d(spec.channels, self.anchors.per_cell * num_classes, 3, padding=1)
        self.box_out = nn.Conv2d(spec.channels, self.anchors.per_cell * 4, 3, padding=1)
        init_dense_head(self, spec.tower_std)
        init.prior(self.cls_out, spec.prior)

    @property
    def tap_channels(self) -> list[int]:
        """Width of each tap."""
        return [self.spec.channels] * 2

    @property
    def lead_channels(self) -> int:
        """Width of the tap that CKD reads."""
        return self.spec.channels

    def taps(self, features: Sequence[Tensor]) -> list[list[Tensor]]:
        """Post-ReLU outputs of the last classification conv (which CKD reads) and of the last box conv.

        ``features``: P3 to P7, (B, in_channels, H, W) each; a tap has (B, channels, H, W) a level.
        """
        return [[self.cls_tower(f) for f in features], [self.box_tower(f) for f in features]]

    def forward(self, features: Sequence[Tensor]) -> RetinaOutputs:
        """``features``: P3 to P7, (B, in_channels, H, W) each."""
        cls_taps, box_taps = taps = self.taps(features)
        return RetinaOutputs([self.cls_out(t) for t in cls_taps], [self.box_out(t) for t in box_taps], taps)

    def losses(
        self, outputs: RetinaOutputs, sizes: Tensor, boxes: Tensor, labels: Tensor, extents: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Focal and L1 loss, each divided by the sum over images of max(1, positives).

        ``sizes`` (B, 2) unpadded (h, w); ``boxes`` (B, G, 4); ``labels`` (B, G), -1 = padding. ``extents`` (B, 2) is how far
        anchors count in each image; None = its size rounded up to a multiple of 32, whatever the batch is padded to.
        """
        grid = self.anchors.grid(outputs.logits)
        valid = valid_anchors(grid, padded_extents(sizes) if extents is None else extents)
        truth = Truth.of(boxes, labels)
        matched = match(grid.boxes, truth, self.spec.positive_iou, self.spec.negative_iou, low_quality_iou=0.0, valid=valid)
        positive = matched >= 0

        target_labels = gather_rows(truth.labels, matched).masked_fill(~positive, -1)
        # Rows without a match encode their own anchor, so that no log(0) arises where it would be masked anyway.
        target_boxes = torch.where(positive.unsqueeze(-1), gather_rows(truth.boxes, matched), grid.boxes)
        target_deltas = encode(target_boxes, grid.boxes)

        logits = torch.cat(flatten_cells(outputs.logits, self.num_classes), dim=1)
        deltas = torch.cat(flatten_cells(outputs.deltas, 4), dim=1)
        normaliser = positive.sum(1).clamp(min=1).sum()
        cls = focal_loss_sum(logits, target_labels, matched >= -1, self.spec.focal_alpha, self.spec.focal_gamma)
        return {"loss_cls": cls / normaliser, "loss_box": l1_sum(deltas, target_deltas, positive) / normaliser}

    @torch.no_grad()
    def proposals(self, outputs: RetinaOutputs, sizes: Tensor) -> Proposals:
        """RoIs for an assistant: the head as an RPN whose score is that of the likeliest class; carries no gradient."""
        best = [m.unflatten(1, (-1, self.num_classes)).amax(2).float().sigmoid() for m in outputs.logits]
        to_boxes = partial(decode, clamp_shrink=self.spec.clamp_shrink)
        return propose(best, outputs.deltas, self.anchors, sizes, self.spec.proposals, to_boxes)

    @torch.no_grad()
    def nearest_cells(self, outputs: RetinaOutputs, boxes: Tensor) -> Tensor:
        """(N, 4) int64 (level, y, x, anchor): the anchor that would propose each of ``boxes`` (N, 4); see Anchors.nearest."""
        return self.anchors.nearest(boxes, [(m.shape[-2], m.shape[-1]) for m in outputs.logits])

    @torch.no_grad()
    def detect(self, outputs: RetinaOutputs, sizes: Tensor) -> Detections:
        """Detections at test settings; ``sizes`` (B, 2) unpadded (h, w)."""
        grid = self.anchors.grid(outputs.logits)
        rules = self.spec.postprocess
        found, offset = [], 0
        for logits, deltas, count in zip(
            flatten_cells(outputs.logits, self.num_classes), flatten_cells(outputs.deltas, 4), grid.counts, strict=True
        ):
            anchor, score, label = best_pairs(logits, rules.pre_nms)
            delta = gather_rows(deltas, anchor).float()
            boxes = decode(delta, grid.boxes[offset + anchor], clamp_shrink=self.spec.clamp_shrink)
            found.append(Found(boxes, score, score, label))
            offset += count
        return conclude(found, sizes, rules, self.num_classes)
