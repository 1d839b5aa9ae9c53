"""Optimizer and learning-rate schedule: the paper's SGD (official ``schedule_1x.py``: linear warm-up, step decay, lr linear in
the global batch), or AdamW, and cosine or one-cycle schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from headkd_ray.job import OptimSpec


def peak_lr(spec: OptimSpec, global_batch: int) -> float:
    """Return the learning rate after warm-up, scaled linearly from ``lr_batch`` to ``global_batch`` images per step."""
    return spec.lr if spec.lr_batch is None else spec.lr * global_batch / spec.lr_batch


def lr_factor(spec: OptimSpec, step: int, steps_per_epoch: int) -> float:
    """Return the fraction of the peak learning rate at optimizer step ``step`` (from 0).

    With milestones, the linear warm-up multiplies the decay, as mmcv's ``StepLrUpdaterHook`` does. ``cosine`` falls from the
    end of the linear warm-up, as in transformers' ``get_cosine_schedule_with_warmup``. ``one_cycle`` also rises along one, as
    torch's ``OneCycleLR`` does (which by default changes the momentum, too).
    """
    warming = step < spec.warmup_steps
    if spec.schedule != "milestones" and not warming:
        falling = max(1, steps_per_epoch * spec.epochs - spec.warmup_steps)
        return _along_cosine(1.0, spec.final_ratio, (step - spec.warmup_steps) / falling)
    if spec.schedule == "one_cycle":
        return _along_cosine(spec.warmup_ratio, 1.0, step / spec.warmup_steps)
    decay = spec.gamma ** sum(step >= epoch * steps_per_epoch for epoch in spec.milestones)
    return decay * (1 - (1 - step / spec.warmup_steps) * (1 - spec.warmup_ratio)) if warming else decay


def _along_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def build_optimizer(
    spec: OptimSpec, parameters: Iterable[torch.nn.Parameter], global_batch: int, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Build the optimizer over the trainable parameters, and its schedule (``scheduler.step()`` once per optimizer step)."""
    free = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": free, "weight_decay": spec.weight_decay}]
    if not spec.norm_decay:
        groups = [
            {"params": [each for each in free if each.ndim > 1], "weight_decay": spec.weight_decay},
            {"params": [each for each in free if each.ndim <= 1], "weight_decay": 0.0},
        ]
    lr = peak_lr(spec, global_batch)
    optimizer: torch.optim.Optimizer
    if spec.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=spec.momentum)
    else:
        # One kernel for all parameters, which counts the steps on the GPU; by default the host counts them.
        fused = True if all(parameter.is_cuda for parameter in free) else None
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=spec.betas, fused=fused)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(spec, step, steps_per_epoch))


def reset_lr(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Set the learning rate of the next step to that of the schedule: a run that was saved at its end may go on with another
    milestone there."""
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)


def retune(state: dict[str, Any], spec: OptimSpec, global_batch: int, steps_per_epoch: int) -> None:
    """Change the learning rate, momentum (``betas``) and weight decay in a saved training state (``loop.save``) to those of
    another job, because a resumed optimizer keeps the saved ones. ``norm_decay`` must be the same in both."""
    peak = peak_lr(spec, global_batch)
    lr = peak * lr_factor(spec, state["step"], steps_per_epoch)
    groups = state["optimizer"]["param_groups"]
    decays = [spec.weight_decay, 0.0][: len(groups)]  # as in build_optimizer
    for group, decay in zip(groups, decays, strict=True):
        group |= {"lr": lr, "initial_lr": peak, "weight_decay": decay}
        if "momentum" in group:
            group["momentum"] = spec.momentum
        if "betas" in group:
            group["betas"] = spec.betas
    state["scheduler"] |= {"base_lrs": [peak] * len(groups), "_last_lr": [lr] * len(groups)}
