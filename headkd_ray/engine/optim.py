"""Optimizer and learning-rate schedule: the paper's SGD (official ``schedule_1x.py``: linear warm-up, step decay, lr linear in
the global batch), or AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from headkd_ray.job import OptimSpec


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
    spec: OptimSpec, parameters: Iterable[torch.nn.Parameter], global_batch: int, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Build the optimizer over the trainable parameters, and its schedule (``scheduler.step()`` once per optimizer step)."""
    free = [parameter for parameter in parameters if parameter.requires_grad]
    lr = peak_lr(spec, global_batch)
    optimizer: torch.optim.Optimizer
    # Fused: one pass over weight, gradient and moments. AdamW's also counts the steps on a GPU, where else the host would.
    if spec.optimizer == "sgd":
        on_cpu = all(parameter.device.type == "cpu" for parameter in free)
        fused = True if on_cpu else None  # on a GPU torch's own choice is about as fast
        optimizer = torch.optim.SGD(free, lr=lr, momentum=spec.momentum, weight_decay=spec.weight_decay, fused=fused)
    else:
        optimizer = torch.optim.AdamW(free, lr=lr, weight_decay=spec.weight_decay, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(spec, step, steps_per_epoch))


def retune(state: dict[str, Any], spec: OptimSpec, global_batch: int, steps_per_epoch: int) -> None:
    """Change the learning rate, momentum and weight decay in a saved training state (``loop.save``) to those of another job,
    because a resumed optimizer keeps the saved ones."""
    peak = peak_lr(spec, global_batch)
    lr = peak * lr_factor(spec, state["step"], steps_per_epoch)
    for group in state["optimizer"]["param_groups"]:
        group |= {"lr": lr, "initial_lr": peak, "weight_decay": spec.weight_decay}
        if "momentum" in group:
            group["momentum"] = spec.momentum
    state["scheduler"] |= {"base_lrs": [peak] * len(state["scheduler"]["base_lrs"]), "_last_lr": [lr]}
