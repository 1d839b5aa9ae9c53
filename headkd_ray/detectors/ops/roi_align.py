"""RoIAlign (He et al. 2017) over the levels of a pyramid: torchvision's result, computed in the way that suits the device.

On the CPU it is a sum of cells of the maps, times weights, which is an embedding bag: all channels of a cell lie side by side,
so that forward and backward pass are vectorised, as torchvision's loops are not (and its backward pass uses one thread). On a
GPU, torchvision's kernel reads one map that shows all levels. While a graph is traced, it reads level by level.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from headkd_ray.detectors.ops.boxes import area
from headkd_ray.detectors.ops.fixed_size import constant, fixed_size
from headkd_ray.detectors.ops.tracing import as_sizes
from headkd_ray.job import RoIHeadSpec


def roi_levels(rois: Tensor, levels: int, finest_scale: float) -> Tensor:
    """Return the pyramid level (R,) int64, 0 = finest, of ``rois`` (R, 4) by mmdet's rule; torchvision's pooler differs."""
    scale = area(rois).clamp(min=0).sqrt()
    return (scale / finest_scale + 1e-6).log2().floor().clamp(0, levels - 1).long()


def pool_rois(features: Sequence[Tensor], strides: Sequence[int], rois: Tensor, image: Tensor, spec: RoIHeadSpec) -> Tensor:
    """Pool the features of ``rois`` (R, 4), each from the level that fits its size: (R, C, pool, pool) float32.

    ``features`` are maps (B, C, H, W) with the given ``strides`` in pixels, ``image`` (R,) is the image of each RoI.
    """
    tracing = torch.jit.is_tracing()
    if not tracing:
        rois = rois.nan_to_num()  # training that diverges ends with the error about its loss, not with one about an index
    level = roi_levels(rois, len(features), spec.finest_scale)
    pool = _pool_side_by_side if fixed_size(rois) else _pool_by_level if tracing else _pool_cells
    return pool(features, strides, rois, image, level, spec)


def _pool_cells(
    features: Sequence[Tensor], strides: Sequence[int], rois: Tensor, image: Tensor, level: Tensor, spec: RoIHeadSpec
) -> Tensor:
    """Pool as :func:`pool_rois` does, as the weighted sum of the cells that each bin of a RoI reads."""
    shapes = torch.tensor([f.shape[-2:] for f in features], device=rois.device)
    boxes = rois / rois.new_tensor(strides)[level].unsqueeze(1) - (0.5 if spec.aligned else 0.0)
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0.0 if spec.aligned else 1.0)
    height, width = shapes[level].unbind(1)
    top, down, down_weights = _bins(boxes[:, 1], size[:, 1], height, spec)
    left, across, across_weights = _bins(boxes[:, 0], size[:, 0], width, spec)

    # Cells have numbers: level by level, image by image, row by row. A bin reads down x across of them.
    cells = shapes.prod(1)
    start = ((cells * features[0].shape[0]).cumsum(0) - cells * features[0].shape[0])[level] + image * cells[level]
    corner = start.view(-1, 1, 1) + top.unsqueeze(2) * width.view(-1, 1, 1) + left.unsqueeze(1)
    counts = down.unsqueeze(2) * across.unsqueeze(1)
    row = torch.arange(top.numel(), device=rois.device).view(*top.shape, 1) * down_weights.shape[2]
    column = torch.arange(left.numel(), device=rois.device).view(-1, 1, left.shape[1]) * across_weights.shape[2]
    fields = (corner, across.unsqueeze(1), width.view(-1, 1, 1), row, column)
    bins = torch.stack([field.expand(counts.shape).flatten() for field in fields], dim=1)
    counts = counts.flatten()
    offsets = counts.cumsum(0) - counts
    # From here on there is a row for each cell that a bin reads.
    corner, across, width, row, column = bins.repeat_interleave(counts, dim=0).unbind(1)
    place = torch.arange(len(corner), device=rois.device) - offsets.repeat_interleave(counts)
    y = place // across
    x = place - y * across
    weights = down_weights.flatten()[row + y] * across_weights.flatten()[column + x]

    table = torch.cat([f.float().permute(0, 2, 3, 1).flatten(0, 2) for f in features])
    pooled = F.embedding_bag(corner + y * width + x, table, offsets, mode="sum", per_sample_weights=weights)
    return pooled.view(-1, spec.pool, spec.pool, table.shape[1]).permute(0, 3, 1, 2)


def _bins(start: Tensor, size: Tensor, limit: Tensor, spec: RoIHeadSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return which cells each bin of a RoI reads along one axis, and how much of each.

    ``start`` and ``size`` (R,) are the RoI's in cells, ``limit`` (R,) the number of cells of its level. Returns the first cell
    (R, pool) and the number of cells (R, pool), int64, and their weights (R, pool, most cells).
    """
    samples = torch.full_like(limit, spec.sampling_ratio) if spec.sampling_ratio > 0 else (size / spec.pool).ceil().long()
    most = max([1, *samples.tolist()])
    limit, number = limit.view(-1, 1, 1), samples.clamp(min=1).view(-1, 1, 1)
    length = (size / spec.pool).view(-1, 1, 1)
    turn = torch.arange(most, device=start.device)
    # In the order in which torchvision computes it, so that rounding is the same.
    at = start.view(-1, 1, 1) + torch.arange(spec.pool, device=start.device).view(-1, 1) * length
    at = at + (turn + 0.5) * length / number
    read = (turn < samples.view(-1, 1, 1)) & (at >= -1) & (at <= limit)  # torchvision reads 0 beyond
    at = at.clamp(min=0)
    low = torch.minimum(at.long(), limit - 1)
    high_weight = (at - low).masked_fill(low == limit - 1, 0.0)

    first = low[..., 0]
    last = low.gather(2, (number - 1).expand(-1, spec.pool, 1)).squeeze(2)
    counts = torch.minimum(last + 1, limit.squeeze(2) - 1) - first + 1
    weights = at.new_zeros(*first.shape, max([2, *counts.flatten().tolist()]) + 1)
    place = (low - first.unsqueeze(2)).clamp(max=weights.shape[2] - 2)  # those that are not read may be farther away
    share = read / number
    weights.scatter_add_(2, place, (1 - high_weight) * share).scatter_add_(2, place + 1, high_weight * share)
    return first, counts, weights


def _pool_side_by_side(
    features: Sequence[Tensor], strides: Sequence[int], rois: Tensor, image: Tensor, level: Tensor, spec: RoIHeadSpec
) -> Tensor:
    """Pool as :func:`pool_rois` does, but from one map that shows all levels side by side, without sorting RoIs by ``level``.

    RoIs lie within their image. The edges of each level are repeated around it, so that RoIAlign reads there what it reads at
    the edge of a map.
    """
    height = max(f.shape[-2] for f in features)
    canvas = torch.cat([F.pad(f.float(), (1, 1, 1, 1 + height - f.shape[-2]), mode="replicate") for f in features], dim=-1)
    starts = list(accumulate((f.shape[-1] + 2 for f in features), initial=1))[: len(features)]
    scale = constant([1 / stride for stride in strides], rois)[level]
    start = constant(starts, rois)[level]
    boxes = rois * scale.unsqueeze(1) + torch.stack([start, torch.ones_like(start)], dim=1).repeat(1, 2)
    rows = torch.cat([image.to(rois).unsqueeze(1), boxes], dim=1)
    return roi_align(canvas, rows, spec.pool, 1.0, spec.sampling_ratio, spec.aligned)


def _pool_by_level(
    features: Sequence[Tensor], strides: Sequence[int], rois: Tensor, image: Tensor, level: Tensor, spec: RoIHeadSpec
) -> Tensor:
    """Pool as :func:`pool_rois` does, with one call for each level, in operators that exported graphs know."""
    order = (level * rois.shape[0] + torch.arange(rois.shape[0], device=level.device)).argsort()  # within a level, as they come
    rows = torch.cat([image.to(rois).unsqueeze(1), rois], dim=1)[order]
    counts = (level.unsqueeze(1) == torch.arange(len(features), device=level.device)).sum(0)
    parts, end = [], 0
    for count in as_sizes(counts):
        parts.append(rows[end : end + count])
        end = end + count
    pooled = [
        roi_align(f.float(), part, spec.pool, 1 / stride, spec.sampling_ratio, spec.aligned)
        for f, stride, part in zip(features, strides, parts, strict=True)
    ]
    return torch.cat(pooled).index_select(0, order.argsort())
