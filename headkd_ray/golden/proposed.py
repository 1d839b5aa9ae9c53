"""The student's proposals together with what every other anchor would have proposed, to judge rows that only one side has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headkd_ray.detectors import Proposals
from headkd_ray.detectors.ops.anchors import Anchors
from headkd_ray.detectors.ops.boxes import clip, decode
from headkd_ray.detectors.ops.proposals import flatten_cells
from headkd_ray.job import ProposalSpec


@dataclass(frozen=True)
class Proposed:
    """Proposals of a batch and all that they were chosen from."""

    proposals: Proposals
    rules: ProposalSpec
    boxes: Tensor
    """(B, N, 4): every anchor's box, decoded and clipped; N in the order (level, y, x, anchor)."""
    scores: Tensor
    """(B, N), in 0..1."""
    shapes: tuple[tuple[int, int], ...]
    """(H, W) of each level."""
    per_cell: int

    @classmethod
    def of(
        cls,
        proposals: Proposals,
        rules: ProposalSpec,
        scores: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Anchors,
        sizes: Tensor,
    ) -> Proposed:
        """From a head's maps: ``scores`` (B, A, H, W) in 0..1 and ``deltas`` (B, A * 4, H, W) a level."""
        grid = anchors.grid(scores)
        boxes = clip(decode(torch.cat(flatten_cells(deltas, 4), dim=1).detach(), grid.boxes), sizes)
        flat = torch.cat(flatten_cells(scores, 1), dim=1).squeeze(-1).detach()
        return cls(proposals, rules, boxes, flat, grid.shapes, anchors.per_cell)

    def at(self, image: int, cells: Tensor) -> tuple[Tensor, Tensor] | None:
        """Boxes (n, 4) and scores (n,) that the anchors at ``cells`` (n, 4) give; None if there is no such cell."""
        sizes = torch.tensor([[h, w, self.per_cell] for h, w in self.shapes])
        level = cells[:, 0]
        if bool((cells < 0).any() or (level >= len(sizes)).any()) or bool((cells[:, 1:] >= sizes[level]).any()):
            return None
        counts = sizes.prod(1)
        width = sizes[level, 1]
        index = (counts.cumsum(0) - counts)[level] + (cells[:, 1] * width + cells[:, 2]) * self.per_cell + cells[:, 3]
        return self.boxes[image, index], self.scores[image, index]

    def cuts(self, image: int) -> list[tuple[int, float]]:
        """(level, score) below which a level's anchors were dropped before NMS, for the levels that have more than enough."""
        found, first = [], 0
        for level, (h, w) in enumerate(self.shapes):
            count = h * w * self.per_cell
            if count > self.rules.pre_nms:
                kept = self.scores[image, first : first + count].topk(self.rules.pre_nms).values
                found.append((level, float(kept[-1])))
            first += count
        return found
