"""Post-processing of a dense head's raw maps into proposals, which keep the cell that they came from, and into detections.

All dense heads and the RPN share it; an anchor-free head has one anchor per cell here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headkd_ray.detectors.ops.anchors import Anchors
from headkd_ray.detectors.ops.boxes import clip, exceeds
from headkd_ray.detectors.ops.fixed_size import fixed_size
from headkd_ray.detectors.ops.matching import gather_rows
from headkd_ray.detectors.ops.nms import grouped_nms, nms_mask, pack
from headkd_ray.detectors.ops.tracing import at_most
from headkd_ray.job import PostprocessSpec, ProposalSpec

Decode = Callable[[Tensor, Tensor], Tensor]
"""A function from box predictions (..., 4) float32 and their anchors (..., 4) to boxes (..., 4)."""


class Proposals(NamedTuple):
    """The proposals of a batch, sorted by score within each image.

    P is the largest number in an image or, where shapes must not depend on values, the largest that is allowed.
    """

    boxes: Tensor
    """(B, P, 4) float32, pixels of the network input, clipped to the unpadded image."""
    scores: Tensor
    """(B, P) float32, 0 = padding."""
    cells: Tensor
    """(B, P, 4) int64: level, y, x, anchor that produced each; level 0 is the head's finest; -1 = padding."""
    valid: Tensor
    """(B, P) bool, False = padding."""


class Detections(NamedTuple):
    """The detections of a batch, sorted by score within each image; N is the largest number in an image."""

    boxes: Tensor
    """(B, N, 4) float32, pixels of the network input, clipped to the unpadded image."""
    scores: Tensor
    """(B, N) float32, 0 = padding."""
    labels: Tensor
    """(B, N) int64, 0 to C-1, -1 = padding."""


def flatten_cells(maps: Sequence[Tensor], channels: int) -> list[Tensor]:
    """Turn anchor-major maps (B, A * channels, H, W) into tables (B, H * W * A, channels) in the order (y, x, anchor)."""
    return [m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, channels) for m in maps]


@torch.no_grad()
def propose(
    scores: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Anchors, sizes: Tensor, spec: ProposalSpec, decode: Decode
) -> Proposals:
    """Take the top anchors of each level by score, decode and clip them, drop degenerate boxes and apply NMS per level.

    ``scores`` (B, A, H, W) per level are in 0..1; ``deltas`` (B, A * 4, H, W) per level are what ``decode`` turns into boxes;
    ``sizes`` (B, 2) are unpadded (h, w).
    """
    boxes, score, cells = best_anchors(scores, deltas, anchors, sizes, spec, decode)
    kept = exceeds(boxes, spec.min_size)
    counts = [min(spec.pre_nms, count) for count in anchors.grid(scores).counts]
    kept &= nms_mask(boxes.masked_fill(~kept.unsqueeze(-1), 0.0), counts, spec.nms_iou)  # no area: suppresses no other box
    best = score.masked_fill(~kept, -1.0).argsort(dim=1, descending=True, stable=True)[:, : spec.post_nms]
    valid = kept.gather(1, best)
    if not fixed_size(boxes):
        width = int(valid.sum(1).max())
        best, valid = best[:, :width], valid[:, :width]
    padding = ~valid
    return Proposals(
        boxes=gather_rows(boxes, best).masked_fill_(padding.unsqueeze(-1), 0),
        scores=score.gather(1, best).masked_fill_(padding, 0),
        cells=gather_rows(cells, best).masked_fill_(padding.unsqueeze(-1), -1),
        valid=valid,
    )


def best_anchors(
    scores: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Anchors, sizes: Tensor, spec: ProposalSpec, decode: Decode
) -> tuple[Tensor, Tensor, Tensor]:
    """Return clipped boxes (B, K, 4), scores (B, K) and cells (B, K, 4) of the best anchors of all levels, before NMS.

    The arguments are those of :func:`propose`.
    """
    grid = anchors.grid(scores)
    tables, offset = [], 0
    for level, (score, delta) in enumerate(zip(scores, flatten_cells(deltas, 4), strict=True)):
        score = score.float().permute(0, 2, 3, 1).flatten(1)
        top, index = score.topk(at_most(spec.pre_nms, score.shape[1]), dim=1)
        boxes = decode(gather_rows(delta, index).float(), grid.boxes[offset + index])
        tables.append((boxes, top, anchors.cells(index, level, grid.shapes[level][1])))
        offset += grid.counts[level]
    boxes, score, cells = (torch.cat(column, dim=1) for column in zip(*tables, strict=True))
    return clip(boxes, sizes), score, cells


class Found(NamedTuple):
    """Candidate detections of one level or of all: K (anchor, class) pairs per image."""

    boxes: Tensor
    """(B, K, 4) float32, pixels of the network input, not clipped."""
    entry: Tensor
    """(B, K) float32: the score that must exceed the threshold."""
    scores: Tensor
    """(B, K) float32: the score that ranks them afterwards."""
    labels: Tensor
    """(B, K) int64, 0 to C-1."""


def best_pairs(logits: Tensor, limit: int, quality: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return anchor, score and class, (B, K) each, of a level's best ``limit`` (anchor, class) pairs, best first.

    The score is p, the sigmoid of ``logits`` (B, N, C); with ``quality`` (B, N) in 0..1 it is sqrt(p * quality).
    """
    # The best K (anchor, class) pairs lie on the best K anchors, so only the anchors need the large sort.
    best = logits.amax(2)
    rank = best if quality is None else best.float().sigmoid() * quality
    _, anchor = rank.topk(at_most(limit, rank.shape[1]), dim=1)
    scores = gather_rows(logits, anchor).float().sigmoid()
    if quality is not None:
        scores = (scores * quality.gather(1, anchor).unsqueeze(2)).sqrt()
    pairs = scores.flatten(1)
    score, pair = pairs.topk(at_most(limit, pairs.shape[1]), dim=1)
    num_classes = logits.shape[2]
    return anchor.gather(1, pair // num_classes), score, pair % num_classes


def conclude(levels: Sequence[Found], sizes: Tensor, rules: PostprocessSpec, num_classes: int) -> Detections:
    """Turn the candidates of all ``levels`` into detections: clip to ``sizes`` (B, 2), filter and suppress by ``rules``."""
    found, passed = filtered(levels, sizes, rules)
    image, row = passed.nonzero(as_tuple=True)
    return suppress(
        found.boxes[image, row],
        found.scores[image, row],
        found.labels[image, row],
        image,
        batch=len(sizes),
        num_classes=num_classes,
        iou=rules.nms_iou,
        limit=rules.max_detections,
    )


def filtered(levels: Sequence[Found], sizes: Tensor, rules: PostprocessSpec) -> tuple[Found, Tensor]:
    """Join ``levels`` and clip their boxes to ``sizes`` (B, 2); also return the mask (B, K) of those that pass ``rules``."""
    found = Found(*(torch.cat(column, dim=1) for column in zip(*levels, strict=True)))
    found = found._replace(boxes=clip(found.boxes, sizes))
    return found, (found.entry > rules.score) & exceeds(found.boxes, rules.min_size)


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, image: Tensor, batch: int, num_classes: int, iou: float, limit: int
) -> Detections:
    """Apply NMS within each class of each image, then keep the best ``limit`` per image.

    ``boxes`` (M, 4), ``scores`` (M,), ``labels`` (M,) and ``image`` (M,) int64 are candidates in any order.
    """
    keep = grouped_nms(boxes, scores, image * num_classes + labels, iou)
    fields = {"boxes": (boxes[keep], 0), "scores": (scores[keep], 0), "labels": (labels[keep], -1)}
    _, packed = pack(image[keep], batch, limit, fields)
    return Detections(packed["boxes"], packed["scores"], packed["labels"])
