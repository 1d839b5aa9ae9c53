"""Optimizer and learning-rate schedule: the paper's SGD (official ``schedule_1x.py``: linear warm-up, step decay, lr linear in
the global batch), or AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from headkd_ray.job import OptimSpec

BACKBONE = "backbone"
"""Key that marks the group of the backbone's parameters in an optimizer."""
_RATES = {"base_lrs": "initial_lr", "_last_lr": "lr"}
"""Where a scheduler keeps the rates of an optimizer's groups."""


def peak_lr(spec: OptimSpec, global_batch: int) -> float:
    """Return the learning rate after warm-up, scaled linearly from ``lr_batch`` to ``global_batch`` images per step."""
    return spec.lr if spec.lr_batch is None else spec.lr * global_batch / spec.lr_batch


def lr_factor(spec: OptimSpec, step: int, steps_per_epoch: int) -> float:
    """Return the fraction of the peak learning rate at optimizer step ``step`` (from 0).

    Warm-up rises linearly from ``warmup_ratio`` and multiplies the decay, as mmcv's ``StepLrUpdaterHook`` does.
    """
    decay = spec.gamma ** sum(step >= epoch * steps_per_epoch for epoch in spec.milestones)
    if step >= spec.warmup_steps:
        return decay
    return decay * (1 - (1 - step / spec.warmup_steps) * (1 - spec.warmup_ratio))


def build_optimizer(
    spec: OptimSpec,
    parameters: Iterable[torch.nn.Parameter],
    global_batch: int,
    steps_per_epoch: int,
    backbone: Iterable[torch.nn.Parameter] = (),
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Build the optimizer over the trainable parameters, and its schedule (``scheduler.step()`` once per optimizer step).

    Those of ``parameters`` that are the ``backbone``'s are a group of their own, if their learning rate differs.
    """
    free = [parameter for parameter in parameters if parameter.requires_grad]
    lr = peak_lr(spec, global_batch)
    apart = set() if spec.backbone_lr_factor == 1.0 else {id(parameter) for parameter in backbone}
    groups: list[dict[str, Any]] = [{"params": [parameter for parameter in free if id(parameter) not in apart]}]
    if apart:
        slow = [parameter for parameter in free if id(parameter) in apart]
        groups.append({"params": slow, "lr": lr * spec.backbone_lr_factor, BACKBONE: True})
    optimizer: torch.optim.Optimizer
    if spec.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
    else:
        # One kernel for all parameters, which counts the steps on the GPU; by default the host counts them.
        fused = True if all(parameter.is_cuda for parameter in free) else None
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=spec.weight_decay, fused=fused)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(spec, step, steps_per_epoch))


def retune(state: dict[str, Any], spec: OptimSpec, global_batch: int, steps_per_epoch: int) -> None:
    """Change the learning rate, momentum and weight decay in a saved training state (``loop.save``) to those of another job,
    because a resumed optimizer keeps the saved ones."""
    groups = state["optimizer"]["param_groups"]
    factor = lr_factor(spec, state["step"], steps_per_epoch)
    for group in groups:
        peak = peak_lr(spec, global_batch) * (spec.backbone_lr_factor if BACKBONE in group else 1.0)
        group |= {"lr": peak * factor, "initial_lr": peak, "weight_decay": spec.weight_decay}
        if "momentum" in group:
            group["momentum"] = spec.momentum
    state["scheduler"] |= {name: [group[key] for group in groups] for name, key in _RATES.items()}
