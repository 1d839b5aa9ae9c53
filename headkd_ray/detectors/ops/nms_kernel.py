"""Greedy NMS on a GPU as one Triton kernel, whose result has a fixed size: torchvision's returns as many indices as survive,
a number for which the host has to wait."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"enable_fp_fusion": False}
"""Without fused multiply-adds, IoUs are rounded as on the CPU, so that both keep the same boxes."""


def greedy_nms(boxes: Tensor, iou: float) -> Tensor:
    """Return the mask (G, K) of the ``boxes`` (G, K, 4) float32, best first, that survive NMS within their own group."""
    groups, count, _ = boxes.shape
    keep = torch.empty(groups, count, dtype=torch.int8, device=boxes.device)
    width = triton.next_power_of_2(count)
    warps = min(max(width // 256, 1), 16)
    with torch.cuda.device_of(boxes):
        _greedy[(groups,)](boxes.contiguous(), keep, count, _below(iou), width, num_warps=warps, **OPTIONS)
    return keep.view(torch.bool)


def _below(iou: float) -> float:
    """Return the greatest float32 up to ``iou``: float32 numbers exceed both or neither."""
    rounded = torch.tensor(iou, dtype=torch.float32)
    return (rounded if rounded.item() <= iou else rounded.nextafter(torch.tensor(-math.inf))).item()


@triton.jit
def _greedy(boxes, keep, count, iou, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Process one group: each box that is still alive at its turn removes those after it that overlap it too much."""
    group = tl.program_id(0)
    place = tl.arange(0, width)
    real = place < count
    rows = boxes + group * count * 4
    x1 = tl.load(rows + place * 4, mask=real, other=0.0)
    y1 = tl.load(rows + place * 4 + 1, mask=real, other=0.0)
    x2 = tl.load(rows + place * 4 + 2, mask=real, other=0.0)
    y2 = tl.load(rows + place * 4 + 3, mask=real, other=0.0)
    areas = (x2 - x1) * (y2 - y1)
    alive = tl.where(real, 1, 0)
    for turn in range(count):
        left = tl.load(rows + turn * 4)
        top = tl.load(rows + turn * 4 + 1)
        right = tl.load(rows + turn * 4 + 2)
        bottom = tl.load(rows + turn * 4 + 3)
        across = tl.maximum(tl.minimum(x2, right) - tl.maximum(x1, left), 0.0)
        down = tl.maximum(tl.minimum(y2, bottom) - tl.maximum(y1, top), 0.0)
        overlap = across * down
        union = (right - left) * (bottom - top) + areas - overlap
        close = tl.div_rn(overlap, union) > iou
        removes = tl.max(tl.where(place == turn, alive, 0), axis=0) > 0
        alive = tl.where(removes & close & (place > turn), 0, alive)
    tl.store(keep + group * count + place, alive.to(tl.int8), mask=real)
