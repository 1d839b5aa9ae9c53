"""RoIs for the training of an R-CNN head: proposals and ground-truth boxes, matched, sampled and in a reproducible order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.matching import NEGATIVE, match
from headkd_ray.detectors.ops.proposals import Proposals
from headkd_ray.detectors.ops.sampling import Sample, sample
from headkd_ray.job import RoIHeadSpec, SamplerSpec


class RoIs(NamedTuple):
    """The RoIs of a batch in one flat list of R, sorted by image, with positives before negatives in each image."""

    boxes: Tensor
    """(R, 4) float32, pixels of the network input."""
    image: Tensor
    """(R,) int64, index of the image in the batch."""
    cells: Tensor
    """(R, 4) int64: level, y, x, anchor that the proposal came from; (-1, -1, -1, index) for a ground-truth box."""
    labels: Tensor
    """(R,) int64, 0 to C-1, C = background."""
    targets: Tensor
    """(R, 4) float32: the ground-truth box to regress to; for background the RoI itself."""

    @property
    def from_proposal(self) -> Tensor:
        """Mask (R,) of the rows that came from an anchor cell, that is, are not ground-truth boxes."""
        return self.cells[:, 0] >= 0


class Candidates(NamedTuple):
    """Ground-truth boxes followed by proposals, all matched; N = G + P."""

    boxes: Tensor
    """(B, N, 4) float32."""
    cells: Tensor
    """(B, N, 4) int64, as in RoIs."""
    matched: Tensor
    """(B, N) int64: index of the ground-truth box, negative if there is none."""
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
    return Candidates(
        boxes=torch.cat([truth.boxes, proposals.boxes], dim=1),
        cells=torch.cat([own_cells, proposals.cells], dim=1),
        matched=torch.cat([own.masked_fill(~truth.present, NEGATIVE), matched], dim=1),
        valid=torch.cat([truth.present, proposals.valid], dim=1),
    )


@torch.no_grad()
def choose(pool: Candidates, chosen: Sample, truth: GroundTruth, num_classes: int) -> RoIs:
    """Return the ``chosen`` candidates as one flat, labelled list."""
    image, place = chosen.valid.nonzero(as_tuple=True)
    row = chosen.picked[image, place]
    boxes, matched = pool.boxes[image, row], pool.matched[image, row]
    positive = matched >= 0
    own = matched.clamp(min=0)
    return RoIs(
        boxes=boxes,
        image=image,
        cells=pool.cells[image, row],
        labels=torch.where(positive, truth.labels[image, own], num_classes),
        targets=torch.where(positive.unsqueeze(-1), truth.boxes[image, own], boxes),
    )


def draw(pool: Candidates, spec: SamplerSpec, generator: torch.Generator | None = None) -> Sample:
    """Sample the candidates of a training step: ``spec.size`` per image, at most ``positive_fraction`` of them positive."""
    return sample((pool.matched >= 0) & pool.valid, (pool.matched < 0) & pool.valid, spec, generator)


def sample_rois(
    proposals: Proposals, truth: GroundTruth, spec: RoIHeadSpec, num_classes: int, generator: torch.Generator | None = None
) -> RoIs:
    """Match and sample ``proposals`` and ``truth`` as ``spec`` says, into the RoIs of an R-CNN head's training step."""
    pool = candidates(proposals, truth, spec.positive_iou)
    return choose(pool, draw(pool, spec.sampler, generator), truth, num_classes)


def flatten(proposals: Proposals) -> tuple[Tensor, Tensor]:
    """Return the boxes (R, 4) and image indices (R,) of all ``proposals`` but the padding, in order."""
    image, row = proposals.valid.nonzero(as_tuple=True)
    return proposals.boxes[image, row], image
