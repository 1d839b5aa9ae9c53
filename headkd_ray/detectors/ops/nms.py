"""Non-maximum suppression in many independent groups (image x level, image x class), and padding of the results.

:func:`nms_mask` is for training, and its result has a fixed size; :func:`grouped_nms` is for detections, any number of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

_CUDA_BOXES = 20_000
"""Most boxes per NMS call on a GPU, whose bit mask needs N^2 / 8 bytes (here 50 MB)."""

_WIDEST = 8192
"""Most boxes of a group that the kernel keeps in a GPU's registers."""


@torch.library.custom_op("headkd_ray::nms_mask", mutates_args=(), schema="(Tensor boxes, int[] counts, float iou) -> Tensor")
def nms_mask(boxes: Tensor, counts: Sequence[int], iou: float) -> Tensor:
    """Return the mask (B, N) of the ``boxes`` (B, N, 4) float32 that survive NMS within their own group.

    Each image's boxes are ``counts`` boxes of one group, best first, then of the next, and so on; the sum of ``counts`` is N.
    """
    keep = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    rank = torch.arange(max(counts, default=0), 0, -1, dtype=boxes.dtype, device=boxes.device)
    for own, kept in zip(boxes, keep, strict=True):
        for group, kept_of_group in zip(own.split(list(counts)), kept.split(list(counts)), strict=True):
            kept_of_group[nms(group, rank[: len(group)], iou)] = True
    return keep


@nms_mask.register_kernel("cuda")
def _nms_mask_on_gpu(boxes: Tensor, counts: Sequence[int], iou: float) -> Tensor:
    """Compute :func:`nms_mask` without a wait or, where Triton does not work or a group is too wide, with torchvision's NMS."""
    batch, groups, widest = len(boxes), len(counts), max(counts, default=0)
    # Groups are padded with boxes without area, which overlap none.
    table = torch.stack([F.pad(part, (0, 0, 0, widest - part.shape[1])) for part in boxes.split(list(counts), dim=1)], dim=1)
    kernel = _kernel(boxes.device) if widest <= _WIDEST else None
    if kernel is not None:
        keep = kernel(table.flatten(0, 1), iou)
    else:
        rank = torch.arange(widest, 0, -1, dtype=boxes.dtype, device=boxes.device).repeat(batch * groups)
        group = torch.arange(batch * groups, device=boxes.device).repeat_interleave(widest)
        keep = torch.zeros_like(group, dtype=torch.bool)
        keep[grouped_nms(table.reshape(-1, 4), rank, group, iou)] = True
    parts = keep.view(batch, groups, widest).unbind(1)
    return torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], dim=1)


@cache
def _kernel(device: torch.device) -> Callable[[Tensor, float], Tensor] | None:
    """Return the Triton kernel, or warn and return None if it does not work on ``device``.

    Triton compiles when a kernel is first called, for which it needs a C compiler.
    """
    try:
        from headkd_ray.detectors.ops.nms_kernel import greedy_nms

        greedy_nms(torch.zeros(1, 64, 4, device=device), 0.5)
    except Exception as error:
        reason = str(error).strip().splitlines() or [repr(error)]
        warnings.warn(
            f"Triton cannot run the NMS kernel on {device} ({reason[-1]}). Training goes on with torchvision's NMS, for which "
            "the host waits in every step. Triton needs a C compiler, such as gcc.",
            stacklevel=2,
        )
        return None
    return greedy_nms


@nms_mask.register_fake
def _nms_mask_shape(boxes: Tensor, counts: Sequence[int], iou: float) -> Tensor:
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


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
