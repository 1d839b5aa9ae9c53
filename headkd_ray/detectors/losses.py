"""Loss terms as plain sums in float32; normalisers belong to the heads. Every sum over nothing is 0 and has zero gradients."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from headkd_ray.detectors.boxes import paired_giou, paired_iou


def focal_loss_sum(logits: Tensor, labels: Tensor, counted: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss, summed: -alpha (1-p)^gamma log p for targets, -(1-alpha) p^gamma log(1-p) for the rest.

    ``logits`` (B, N, C); ``labels`` (B, N) int64, -1 = background; ``counted`` (B, N) bool, False = no loss.
    Every entry first pays the background price; then the one entry a row that is a target is corrected, which saves a
    one-hot target and a second pass over B x N x C.
    """
    logits = logits.float()
    background = (1 - alpha) * _power(logits.sigmoid(), gamma) * F.softplus(logits)
    total = background.sum(-1).masked_fill(~counted, 0.0).sum()
    target = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    paid = (1 - alpha) * _power(target.sigmoid(), gamma) * F.softplus(target)
    owed = alpha * _power((-target).sigmoid(), gamma) * F.softplus(-target)
    return total + (owed - paid).masked_fill(~((labels >= 0) & counted), 0.0).sum()


def _power(value: Tensor, exponent: float) -> Tensor:
    return value * value if exponent == 2 else value.pow(exponent)


def l1_sum(predicted: Tensor, target: Tensor, counted: Tensor, beta: float = 0.0) -> Tensor:
    """Sum of d = |predicted - target| over the rows (...,) that are ``counted``; predicted and target are (..., 4).

    With a ``beta`` above 0 smooth L1: d - beta / 2, but d^2 / (2 beta) where d is below ``beta``.
    """
    if beta > 0:
        distance = F.smooth_l1_loss(predicted.float(), target, reduction="none", beta=beta)
    else:
        distance = (predicted.float() - target).abs()
    return distance.sum(-1).masked_fill(~counted, 0.0).sum()


def smooth_l1_sum(predicted: Tensor, target: Tensor, counted: Tensor, beta: float) -> Tensor:
    """Sum over the rows (...,) that are ``counted`` of d^2 / (2 beta) where d = |predicted - target| is below ``beta``, else
    d - beta / 2; predicted and target are (..., 4)."""
    price = F.smooth_l1_loss(predicted.float(), target, reduction="none", beta=beta)
    return price.sum(-1).masked_fill(~counted, 0.0).sum()


def iou_sum(predicted: Tensor, target: Tensor, weights: Tensor, kind: Literal["giou", "iou"]) -> Tensor:
    """Sum over boxes ``predicted`` and ``target`` (..., 4) with ``weights`` (...), 0 = no loss.

    giou: weight x (1 - generalised IoU); iou: weight x -log IoU, IoU at least 1e-6 (mmdet's IoULoss). Rows of weight 0 compare
    the target with itself, so that an overflow in one never meets the factor 0.
    """
    predicted = torch.where(weights.unsqueeze(-1) > 0, predicted.float(), target)
    if kind == "giou":
        return ((1 - paired_giou(predicted, target)) * weights).sum()
    return (-paired_iou(predicted, target)[0].clamp(min=1e-6).log() * weights).sum()


def binary_cross_entropy_sum(logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Sum of the sigmoid cross entropy of ``logits`` (...) with ``target`` (...), bool or 0..1, where ``counted`` (...)."""
    price = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    return price.masked_fill(~counted, 0.0).sum()


def mean_squared_error(student: Tensor, target: Tensor) -> Tensor:
    """Mean of (student - target)^2 over all elements; 0, not NaN, if there are none. ``target`` gets no gradient."""
    return F.mse_loss(student.float(), target.detach().float(), reduction="sum") / max(student.numel(), 1)


def cross_entropy_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross entropy of ``logits`` (R, C+1) with ``labels`` (R,) int64, averaged over R; 0 if R = 0."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / max(len(labels), 1)
