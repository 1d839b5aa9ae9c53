"""Conventions that a golden file leaves open (image padding, sampled RoIs), settled so that the rest can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headkd_ray.detectors import DenseHead, GroundTruth, Proposals, RoIs
from headkd_ray.detectors.ops.anchors import AnchorGrid, Anchors, valid_anchors
from headkd_ray.detectors.ops.rois import Candidates, candidates, choose
from headkd_ray.detectors.ops.sampling import sample
from headkd_ray.detectors.rpn import RPN
from headkd_ray.golden.file import Golden
from headkd_ray.golden.rows import nearest_rows, positions
from headkd_ray.golden.tolerances import VALUES
from headkd_ray.job import SamplerSpec

ALL = SamplerSpec(size=1 << 20, positive_fraction=1.0)
"""A sampler that takes every candidate."""


class AnchorsWithin(Anchors):
    """Anchors that are valid within given extents instead of each image's own padded size."""

    def __init__(self, anchors: Anchors, extents: Tensor) -> None:
        """``extents`` (B, 2) are the (h, w) within which anchors are valid in each image."""
        super().__init__(anchors.spec, anchors.strides, anchors.offset)
        self.extents = extents

    def valid(self, grid: AnchorGrid, sizes: Tensor) -> Tensor:
        return valid_anchors(grid, self.extents)


def own_losses(
    golden: Golden, x: Tensor, head: DenseHead[Any] | RPN, compute: Callable[[], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the losses of ``head`` from ``compute``, by their official names, and notes on where anchors were valid if not by
    the official rule.

    The optional array ``pad_sizes`` (B, 2) gives the valid extents. Without it each image counts as padded by itself (the
    official rule), unless this misses the file's losses and padding to the batch's shape reproduces them.
    """
    official = head.anchors

    def within(extents: Tensor) -> dict[str, Tensor]:
        head.anchors = AnchorsWithin(official, extents)
        losses = compute()
        head.anchors = official
        return losses

    if golden.has("pad_sizes"):
        stated = within(golden.tensor("pad_sizes").long().to(x.device))
        return stated, dict.fromkeys(stated, "anchors valid as pad_sizes says")
    wanted = golden.scalars("losses_json")

    def meets(losses: dict[str, Tensor]) -> bool:
        pairs = [(float(loss.detach()), wanted[name]) for name, loss in losses.items() if name in wanted]
        return all(abs(ours - theirs) <= VALUES * abs(theirs) for ours, theirs in pairs)

    usual = compute()
    if not meets(usual):
        batch_wide = torch.tensor(x.shape[-2:], device=x.device).expand(len(x), 2)
        other = within(batch_wide)
        if meets(other):
            note = "anchors valid in the whole batch's shape, not in each image's own padding"
            return other, dict.fromkeys(other, note)
    return usual, {}


def own_rois(golden: Golden, proposals: Proposals, truth: GroundTruth, num_classes: int, positive_iou: float) -> RoIs:
    """Return the candidates that the file chose, in the official order.

    All of ours are returned if the file names none, or one that was not proposed. Where a near-tie in NMS has kept other
    proposals than the file's, candidates come from the file's, so that later quantities can be compared; the proposals
    themselves are compared elsewhere.
    """
    pool = candidates(proposals, truth, positive_iou)
    allowed = pool.valid
    if golden.has("roi_ids"):
        wanted = {tuple(row) for row in golden.tensor("roi_ids").long().tolist()}
        for attempt in (pool, _file_candidates(golden, truth, positive_iou)):
            if attempt is None:
                continue
            named = [[(image, *cell) in wanted for cell in cells] for image, cells in enumerate(attempt.cells.tolist())]
            chosen = torch.tensor(named, device=attempt.valid.device).reshape(attempt.valid.shape) & attempt.valid
            if int(chosen.sum()) == len(wanted):
                pool, allowed = attempt, chosen
                break
    positive = pool.matched >= 0
    return choose(pool, sample(positive & allowed, ~positive & allowed, ALL), truth, num_classes)


def file_rois(golden: Golden, own: RoIs) -> RoIs:
    """Return the RoIs of the file, with its boxes and in its order, with their labels and cells as ``own`` has them.

    Features and losses at its boxes do not suffer from the rounding of proposals, which are compared by themselves. Boxes that
    the file does not have are those of ``own``, and so are all RoIs if the file has others.
    """
    place = places_of_rois(golden, own)
    if place is None:
        return own
    ordered = RoIs(*(field[place.to(field.device)] for field in own))
    tables = golden.per_image("rois", len(golden.tensor("images")))
    if tables is None or sum(map(len, tables)) != len(place):
        return ordered
    return ordered._replace(boxes=torch.cat([table[:, :4] for table in tables]).float().to(own.boxes.device))


def places_of_rois(golden: Golden, own: RoIs) -> Tensor | None:
    """Find each RoI of the file in ``own``: (R,) int64 on the CPU, or None if some are not there.

    They are told by their ids, or in a file without ids by their boxes. A file without either has those of ``own``.
    """
    image = own.image.cpu()
    if golden.has("roi_ids"):
        found = positions(torch.cat([image[:, None], own.cells.cpu()], dim=1), golden.tensor("roi_ids").long())
        return None if found is None or bool((found < 0).any()) else found
    tables = golden.per_image("rois", len(golden.tensor("images")))
    if tables is None:
        return torch.arange(len(image))
    places = []
    for i, table in enumerate(tables):
        rows = (image == i).nonzero().flatten()
        nearest = nearest_rows(own.boxes.detach().cpu()[rows], table[:, :4])
        if nearest is None:
            return None
        places.append(rows[nearest])
    return torch.cat(places)


def _file_candidates(golden: Golden, truth: GroundTruth, positive_iou: float) -> Candidates | None:
    tables = golden.per_image("proposals", len(truth.labels))
    if tables is None or any(table.shape[1] != 9 for table in tables):
        return None
    device = truth.labels.device
    rows = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).float().to(device)
    valid = torch.arange(rows.shape[1], device=device) < torch.tensor([len(table) for table in tables], device=device)[:, None]
    cells = rows[..., 5:].long().masked_fill(~valid.unsqueeze(-1), -1)
    return candidates(Proposals(rows[..., :4], rows[..., 4], cells, valid), truth, positive_iou)
