"""Non-maximum suppression in many independent groups (image x level, image x class), and padding of the results."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.ops import nms

_CUDA_BOXES = 20_000
"""Most boxes per NMS call on a GPU, whose bit mask needs N^2 / 8 bytes (here 50 MB)."""


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """Return the indices (M,) int64 of the boxes that survive NMS within their own group, by decreasing score.

    ``boxes`` (N, 4), ``scores`` (N,), ``groups`` (N,) int64 from 0. A group's result does not depend on the other groups: on
    CPU each has its own call (the op is quadratic, so many small calls beat one large one); on GPU groups share calls,
    separated by an offset that is added in float64 because float32 would move the boxes by up to 1/64 pixel.
    """
    if boxes.numel() == 0:
        return groups.new_zeros(0)
    order = groups.argsort(stable=True)
    counts = groups.bincount().tolist()
    boxes, scores, groups = boxes[order], scores[order], groups[order]
    kept, start = [], 0
    for size in _call_sizes(counts, _CUDA_BOXES if boxes.is_cuda else 1):
        part = slice(start, start + size)
        kept.append(_nms_call(boxes[part], scores[part], groups[part], iou, single=not boxes.is_cuda) + start)
        start += size
    survivors = torch.cat(kept)
    survivors = survivors[scores[survivors].argsort(descending=True, stable=True)]
    return order[survivors]


def _call_sizes(counts: list[int], budget: int) -> list[int]:
    """Merge neighbouring groups of ``counts`` boxes into calls of at most ``budget`` boxes (more only for a single group)."""
    sizes: list[int] = []
    for count in counts:
        if count == 0:
            continue
        if sizes and sizes[-1] + count <= budget:
            sizes[-1] += count
        else:
            sizes.append(count)
    return sizes


def _nms_call(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float, single: bool) -> Tensor:
    if single:
        return nms(boxes, scores, iou)
    boxes = boxes.double()
    span = boxes.max() - boxes.min() + 1
    return nms(boxes + ((groups - groups[0]) * span).unsqueeze(1), scores.double(), iou)


def pack(image: Tensor, batch: int, limit: int, fields: Mapping[str, tuple[Tensor, float]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn rows sorted by score into padded per-image tables.

    ``image`` (M,) int64 is the image of each row; ``fields`` maps a name to (rows (M, ...), padding value). Returns the mask
    (B, K) of real rows and the fields as (B, K, ...), in the given order within each image. K is the largest number of rows
    of an image, at most ``limit``.
    """
    order = image.argsort(stable=True)
    counts = image.bincount(minlength=batch)
    owner = image[order]
    rank = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[owner]
    width = min(limit, int(counts.max()))
    fits = rank < width
    owner, rank, order = owner[fits], rank[fits], order[fits]
    valid = torch.zeros(batch, width, dtype=torch.bool, device=image.device)
    valid[owner, rank] = True
    tables = {}
    for name, (rows, padding) in fields.items():
        table = rows.new_full((batch, width, *rows.shape[1:]), padding)
        table[owner, rank] = rows[order]
        tables[name] = table
    return valid, tables
