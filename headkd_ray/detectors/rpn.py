"""The region proposal network of Faster R-CNN and Cascade R-CNN, on P2 to P6."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.anchors import Anchors
from headkd_ray.detectors.ops.boxes import decode, encode
from headkd_ray.detectors.ops.losses import binary_cross_entropy_sum, l1_sum
from headkd_ray.detectors.ops.matching import NEGATIVE, at_least_one_each, gather_rows, match, row_weights
from headkd_ray.detectors.ops.proposals import Proposals, flatten_cells, propose
from headkd_ray.detectors.ops.sampling import sample
from headkd_ray.detectors.towers import init_dense_head, tower
from headkd_ray.job import RPNSpec

STRIDES = (4, 8, 16, 32, 64)
"""Strides of P2 to P6 in pixels."""


class RPNOutputs(NamedTuple):
    """The RPN's outputs, one map per level; A anchors per cell."""

    logits: list[Tensor]
    """Objectness logits (B, A, H, W)."""
    deltas: list[Tensor]
    """Box deltas (B, A * 4, H, W), anchor-major, with standard deviations of 1."""


class RPN(nn.Module):
    """A network that predicts objectness and box of every anchor; initial weights follow ``spec``."""

    def __init__(self, spec: RPNSpec, channels: int) -> None:
        super().__init__()
        self.spec = spec
        self.anchors = Anchors(spec.anchors, STRIDES)
        self.tower = tower(channels, channels, spec.convs)
        self.cls_out = nn.Conv2d(channels, self.anchors.per_cell, 1)
        self.box_out = nn.Conv2d(channels, self.anchors.per_cell * 4, 1)
        init_dense_head(self, spec.tower_std)

    def forward(self, features: Sequence[Tensor]) -> RPNOutputs:
        """Run the RPN on ``features``, P2 to P6, (B, channels, H, W) each."""
        hidden = [self.tower(f) for f in features]
        return RPNOutputs([self.cls_out(h) for h in hidden], [self.box_out(h) for h in hidden])

    def losses(
        self,
        outputs: RPNOutputs,
        truth: GroundTruth,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Compute cross entropy and (smooth) L1 on sampled anchors, each divided by the batch's number of samples (mmdet).

        ``generator`` draws the samples.
        """
        grid = self.anchors.grid(outputs.logits)
        valid = self.anchors.valid(grid, truth.sizes)
        low = self.spec.negative_iou
        matched = match(grid.boxes, truth, self.spec.positive_iou, low, low_quality_iou=low, valid=valid)
        chosen = sample(matched >= 0, matched == NEGATIVE, self.spec.sampler, generator)

        logits = torch.cat(flatten_cells(outputs.logits, 1), dim=1).squeeze(-1).gather(1, chosen.picked)
        deltas = gather_rows(torch.cat(flatten_cells(outputs.deltas, 4), dim=1), chosen.picked)
        matched, anchors = matched.gather(1, chosen.picked), grid.boxes[chosen.picked]
        positive = (matched >= 0) & chosen.valid
        target_boxes = torch.where(positive.unsqueeze(-1), gather_rows(truth.boxes, matched), anchors)

        # mmdet counts at least one positive and one negative per image.
        samples = at_least_one_each(positive, truth) + at_least_one_each(chosen.valid & ~positive, truth)
        weights = row_weights(matched, truth) * chosen.valid
        return {
            "loss_rpn_cls": binary_cross_entropy_sum(logits, positive, weights) / samples,
            "loss_rpn_box": l1_sum(deltas, encode(target_boxes, anchors), weights * positive, self.spec.box_beta) / samples,
        }

    @torch.no_grad()
    def proposals(self, outputs: RPNOutputs, sizes: Tensor) -> Proposals:
        """Propose RoIs by the training rules in train mode, else by the test rules; they carry no gradient."""
        rules = self.spec.train_proposals if self.training else self.spec.test_proposals
        return propose(*self.scored(outputs), self.anchors, sizes, rules, self.decode)

    def scored(self, outputs: RPNOutputs) -> tuple[list[Tensor], list[Tensor]]:
        """Return objectness (B, A, H, W) in 0..1 and box deltas (B, A * 4, H, W) of each level."""
        return [logits.float().sigmoid() for logits in outputs.logits], outputs.deltas

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Turn ``deltas`` (..., 4) at ``anchors`` (..., 4) into boxes (..., 4) in pixels."""
        return decode(deltas, anchors, clamp_shrink=self.spec.clamp_shrink)
