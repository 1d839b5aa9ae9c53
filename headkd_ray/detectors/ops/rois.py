"""RoIs for the training of an R-CNN head: proposals and ground-truth boxes, matched, sampled and in a reproducible order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.fixed_size import fixed_size
from headkd_ray.detectors.ops.matching import NEGATIVE, match, row_weights, settled
from headkd_ray.detectors.ops.proposals import Proposals
from headkd_ray.detectors.ops.sampling import Sample, sample
from headkd_ray.job import RoIHeadSpec, SamplerSpec


class RoIs(NamedTuple):
    """The RoIs of a batch in one flat list of R, sorted by image, with positives before negatives in each image.

    Where shapes must not depend on values, padding follows in each image, so that all have equally many rows.
    """

    boxes: Tensor
    """(R, 4) float32, pixels of the network input."""
    image: Tensor
    """(R,) int64, index of the image in the batch."""
    cells: Tensor
    """(R, 4) int64: level, y, x, anchor that the proposal came from; (-1, -1, -1, index) for a ground-truth box;
    -1 = padding."""
    labels: Tensor
    """(R,) int64, 0 to C-1, C = background, -1 = padding."""
    targets: Tensor
    """(R, 4) float32: the ground-truth box to regress to; for background the RoI itself."""
    weights: Tensor
    """(R,) float32: weight of the RoI in the head's losses; 0 = nothing is known about it, or padding. Distillation compares
    RoIs whatever their weight is."""

    @property
    def from_proposal(self) -> Tensor:
        """Mask (R,) of the rows that came from an anchor cell, that is, are neither ground-truth boxes nor padding."""
        return self.cells[:, 0] >= 0

    @property
    def counted(self) -> Tensor | None:
        """Mask (R,) of the rows that are not padding, or None if there is none."""
        return self.labels >= 0 if fixed_size(self.labels) else None


class Candidates(NamedTuple):
    """Ground-truth boxes followed by proposals, all matched; N = G + P."""

    boxes: Tensor
    """(B, N, 4) float32."""
    cells: Tensor
    """(B, N, 4) int64, as in RoIs."""
    matched: Tensor
    """(B, N) int64: index of the ground-truth box, else NEGATIVE or IGNORED."""
    valid: Tensor
    """(B, N) bool, False = padding."""


@torch.no_grad()
def candidates(proposals: Proposals, truth: GroundTruth, positive_iou: float) -> Candidates:
    """Match ``proposals`` with ``truth`` (positive from ``positive_iou`` on, else background) and prepend the truth."""
    matched = match(proposals.boxes, truth, positive_iou, positive_iou, valid=proposals.valid)
    batch, count = truth.labels.shape
    own = torch.arange(count, device=matched.device).expand(batch, -1)
    own_cells = torch.full((batch, count, 4), -1, device=matched.device)
    own_cells[..., 3] = own
    own = settled(own.masked_fill(~truth.present, NEGATIVE), truth)
    return Candidates(
        boxes=torch.cat([truth.boxes, proposals.boxes], dim=1),
        cells=torch.cat([own_cells, proposals.cells], dim=1),
        matched=torch.cat([own, matched], dim=1),
        valid=torch.cat([truth.counted, proposals.valid], dim=1),
    )


@torch.no_grad()
def choose(pool: Candidates, chosen: Sample, truth: GroundTruth, num_classes: int, padded: bool = False) -> RoIs:
    """Return the ``chosen`` candidates as one flat, labelled list, with the padding of ``chosen`` if ``padded``."""
    image, place = places(chosen.valid, padded)
    row = chosen.picked[image, place]
    boxes, matched = pool.boxes[image, row], pool.matched[image, row]
    positive = matched >= 0
    own = matched.clamp(min=0)
    rois = RoIs(
        boxes=boxes,
        image=image,
        cells=pool.cells[image, row],
        labels=torch.where(positive, truth.labels[image, own], num_classes),
        targets=torch.where(positive.unsqueeze(-1), truth.boxes[image, own], boxes),
        weights=row_weights(pool.matched, truth)[image, row],
    )
    return marked(rois, chosen.valid) if padded else rois


def places(valid: Tensor, padded: bool) -> tuple[Tensor, Tensor]:
    """Return row and column, (R,) int64 each, of the entries of ``valid`` (B, N) that are True, or of all if ``padded``."""
    if not padded:
        row, column = valid.nonzero(as_tuple=True)
        return row, column
    row, column = (torch.arange(count, device=valid.device) for count in valid.shape)
    return row.unsqueeze(1).expand(valid.shape).flatten(), column.expand(valid.shape).flatten()


def marked(rois: RoIs, valid: Tensor) -> RoIs:
    """Mark the ``rois`` that are not ``valid`` (B, R / B) as padding."""
    padding = ~valid.flatten()
    return rois._replace(
        cells=rois.cells.masked_fill(padding.unsqueeze(-1), -1),
        labels=rois.labels.masked_fill(padding, -1),
        weights=rois.weights.masked_fill(padding, 0.0),
    )


def draw(pool: Candidates, spec: SamplerSpec, generator: torch.Generator | None = None) -> Sample:
    """Sample the candidates of a training step: ``spec.size`` per image, at most ``positive_fraction`` of them positive."""
    return sample((pool.matched >= 0) & pool.valid, (pool.matched < 0) & pool.valid, spec, generator)


def sample_rois(
    proposals: Proposals, truth: GroundTruth, spec: RoIHeadSpec, num_classes: int, generator: torch.Generator | None = None
) -> RoIs:
    """Match and sample ``proposals`` and ``truth`` as ``spec`` says, into the RoIs of an R-CNN head's training step."""
    pool = candidates(proposals, truth, spec.positive_iou)
    return choose(pool, draw(pool, spec.sampler, generator), truth, num_classes, padded=fixed_size(pool.boxes))


def flatten(proposals: Proposals) -> tuple[Tensor, Tensor]:
    """Return the boxes (R, 4) and image indices (R,) of all ``proposals`` but the padding, in order."""
    image, row = proposals.valid.nonzero(as_tuple=True)
    return proposals.boxes[image, row], image
