"""Losses as plain sums in float32, which the heads normalise. A sum over nothing is 0 and has zero gradients.

Their ``weights`` are float32, or bool: rows of weight 0 give no loss, whatever their values are.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from headkd_ray.detectors.ops.boxes import paired_giou, paired_iou


def weighted_sum(price: Tensor, weights: Tensor) -> Tensor:
    """Sum ``price`` with ``weights``, both (...), without those of weight 0, of which even an infinite one does not matter."""
    return (price.masked_fill(weights == 0, 0.0) * weights).sum()


def _with_classes(weights: Tensor, labels: Tensor, class_weights: Tensor | None) -> Tensor:
    """Return ``weights`` (B, N), each times the weight of its class in ``labels`` (B, N), of which -1 is the last weight."""
    return weights if class_weights is None else weights * class_weights[labels]


def focal_loss_sum(
    logits: Tensor, labels: Tensor, weights: Tensor, alpha: float, gamma: float, class_weights: Tensor | None = None
) -> Tensor:
    """Sum the sigmoid focal loss: -alpha (1-p)^gamma log p for targets, -(1-alpha) p^gamma log(1-p) for the rest.

    ``logits`` (B, N, C); ``labels`` (B, N) int64, -1 = background; ``weights`` (B, N); ``class_weights`` (C + 1,) multiply the
    rows of each class, background last. All entries are first summed as background; then the one target in each row is
    corrected. This saves a one-hot target and a second pass over B x N x C.
    """
    logits = logits.float()
    weights = _with_classes(weights, labels, class_weights)
    background = (1 - alpha) * _power(logits.sigmoid(), gamma) * F.softplus(logits)
    total = weighted_sum(background.sum(-1), weights)
    target = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    paid = (1 - alpha) * _power(target.sigmoid(), gamma) * F.softplus(target)
    owed = alpha * _power((-target).sigmoid(), gamma) * F.softplus(-target)
    return total + weighted_sum(owed - paid, weights * (labels >= 0))


def _power(value: Tensor, exponent: float) -> Tensor:
    return value * value if exponent == 2 else value.pow(exponent)


def quality_focal_loss_sum(
    logits: Tensor, labels: Tensor, quality: Tensor, weights: Tensor, beta: float, class_weights: Tensor | None = None
) -> Tensor:
    """Sum the quality focal loss (GFL): |q - p|^beta times the cross entropy of p with q.

    q is ``quality`` (B, N) in 0..1 at a target and 0 elsewhere. ``logits`` (B, N, C); ``labels`` (B, N) int64, -1 = background;
    ``weights`` (B, N); ``class_weights`` as in :func:`focal_loss_sum`, where also the one target in each row is corrected
    afterwards.
    """
    logits = logits.float()
    weights = _with_classes(weights, labels, class_weights)
    background = _power(logits.sigmoid(), beta) * F.softplus(logits)
    total = weighted_sum(background.sum(-1), weights)
    target = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    paid = _power(target.sigmoid(), beta) * F.softplus(target)
    entropy = F.binary_cross_entropy_with_logits(target, quality, reduction="none")
    owed = _power((quality - target.sigmoid()).abs(), beta) * entropy
    return total + weighted_sum(owed - paid, weights * (labels >= 0))


def distribution_focal_loss_sum(bins: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Sum the distribution focal loss (GFL) with ``weights`` (..., broadcast).

    It is the cross entropy of the distribution with the two integers around the target, each weighted by its proximity.
    ``bins`` (..., M + 1) are logits of the numbers 0 to M; ``target`` (...) is at least 0 and below M.
    """
    log = bins.float().log_softmax(-1)
    low = target.floor()
    below, above = (log.gather(-1, (low + i).long().unsqueeze(-1)).squeeze(-1) for i in (0, 1))
    return -((below * (low + 1 - target) + above * (target - low)) * weights).sum()


def mean_over_workers(value: Tensor, is_idle: bool = False) -> Tensor:
    """Average a scalar without gradient over the processes of a distributed run; a single process gets it unchanged.

    A process with ``is_idle`` has no images of its own in this step, and does not count.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    counts = torch.full_like(value, float(not is_idle))
    total = torch.stack([value * counts, counts])
    dist.all_reduce(total)
    return total[0] / total[1].clamp(min=1)


def l1_sum(predicted: Tensor, target: Tensor, weights: Tensor, beta: float = 0.0) -> Tensor:
    """Sum d = |predicted - target|, both (..., 4), over the rows, with ``weights`` (...).

    With ``beta`` above 0 it is smooth L1: d - beta / 2, but d^2 / (2 beta) where d is below ``beta``.
    """
    if beta > 0:
        distance = F.smooth_l1_loss(predicted.float(), target, reduction="none", beta=beta)
    else:
        distance = (predicted.float() - target).abs()
    return weighted_sum(distance.sum(-1), weights)


def iou_sum(predicted: Tensor, target: Tensor, weights: Tensor, kind: Literal["giou", "iou"]) -> Tensor:
    """Sum an IoU loss over boxes ``predicted`` and ``target`` (..., 4) with ``weights`` (...), 0 = no loss.

    giou: weight x (1 - generalised IoU); iou: weight x -log IoU, IoU at least 1e-6 (mmdet's IoULoss). Rows of weight 0 compare
    the target with itself, so that an overflow in one is never multiplied by 0.
    """
    predicted = torch.where(weights.unsqueeze(-1) > 0, predicted.float(), target)
    if kind == "giou":
        return ((1 - paired_giou(predicted, target)) * weights).sum()
    return (-paired_iou(predicted, target)[0].clamp(min=1e-6).log() * weights).sum()


def binary_cross_entropy_sum(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Sum the sigmoid cross entropy of ``logits`` (...) with ``target`` (...), bool or 0..1, with ``weights`` (...)."""
    price = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    return weighted_sum(price, weights)


def mean_squared_error(student: Tensor, target: Tensor) -> Tensor:
    """Return the mean of (student - target)^2, or 0, not NaN, if there are no elements. ``target`` gets no gradient."""
    return F.mse_loss(student.float(), target.detach().float(), reduction="sum") / max(student.numel(), 1)


def cross_entropy_mean(logits: Tensor, labels: Tensor, weights: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Sum the softmax cross entropy of ``logits`` (R, C+1) with ``labels`` (R,) int64 and ``weights`` (R,), and divide it by
    the number of rows with weight; 0 if there are none.

    ``class_weights`` (C + 1,) multiply the rows of each class; the mean is over the number of rows, not over their weights.
    """
    known = labels.masked_fill(weights == 0, -1)
    price = F.cross_entropy(logits.float(), known, class_weights, reduction="none", ignore_index=-1)
    return weighted_sum(price, weights) / (weights > 0).sum().clamp(min=1)
