"""The student's proposals with the boxes and scores of all anchors, to judge proposals that only one side has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headkd_ray.detectors import Proposals
from headkd_ray.detectors.ops.anchors import Anchors
from headkd_ray.detectors.ops.boxes import clip
from headkd_ray.detectors.ops.proposals import flatten_cells
from headkd_ray.job import ProposalSpec


@dataclass(frozen=True)
class Proposed:
    """The proposals of a batch and all candidates from which they were chosen."""

    proposals: Proposals
    rules: ProposalSpec
    boxes: Tensor
    """Every anchor's box (B, N, 4), decoded and clipped; N in the order (level, y, x, anchor)."""
    scores: Tensor
    """Every anchor's score (B, N) in 0..1."""
    shapes: tuple[tuple[int, int], ...]
    """(H, W) of each level."""
    per_cell: int

    @classmethod
    def of(
        cls,
        proposals: Proposals,
        rules: ProposalSpec,
        scores: Sequence[Tensor],
        predicted: Sequence[Tensor],
        decode: Callable[[Tensor, Tensor], Tensor],
        anchors: Anchors,
        sizes: Tensor,
    ) -> Proposed:
        """Build it from a head's maps: ``scores`` (B, A, H, W) in 0..1 and ``predicted`` (B, A * 4, H, W) per level, which
        ``decode`` turns with their anchors into boxes."""
        grid = anchors.grid(scores)
        boxes = clip(decode(torch.cat(flatten_cells(predicted, 4), dim=1).detach().float(), grid.boxes), sizes)
        flat = torch.cat(flatten_cells(scores, 1), dim=1).squeeze(-1).detach()
        return cls(proposals, rules, boxes, flat, grid.shapes, anchors.per_cell)

    def at(self, image: int, cells: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the boxes (n, 4) and scores (n,) of the anchors at ``cells`` (n, 4), or None if a cell does not exist."""
        sizes = torch.tensor([[h, w, self.per_cell] for h, w in self.shapes])
        level = cells[:, 0]
        if bool((cells < 0).any() or (level >= len(sizes)).any()) or bool((cells[:, 1:] >= sizes[level]).any()):
            return None
        counts = sizes.prod(1)
        width = sizes[level, 1]
        index = (counts.cumsum(0) - counts)[level] + (cells[:, 1] * width + cells[:, 2]) * self.per_cell + cells[:, 3]
        return self.boxes[image, index], self.scores[image, index]

    def cuts(self, image: int) -> list[tuple[int, float]]:
        """Return (level, score) pairs: the score below which anchors of a level with more than ``pre_nms`` were dropped."""
        found, first = [], 0
        for level, (h, w) in enumerate(self.shapes):
            count = h * w * self.per_cell
            if count > self.rules.pre_nms:
                kept = self.scores[image, first : first + count].topk(self.rules.pre_nms).values
                found.append((level, float(kept[-1])))
            first += count
        return found
