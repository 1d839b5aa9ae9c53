"""Optimizer and learning-rate schedule: the paper's SGD (official ``schedule_1x.py``: linear warm-up, step decay, lr linear in
the global batch), or AdamW, and cosine or one-cycle schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from headkd_ray.job import OptimSpec

BACKBONE = "backbone"
"""Mark of a group of the backbone's parameters in an optimizer."""
BARE = "bare"
"""Mark of a group of parameters that do not decay."""
_RATES = {"base_lrs": "initial_lr", "_last_lr": "lr"}
"""Where a scheduler keeps the rates of an optimizer's groups."""


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
    spec: OptimSpec,
    parameters: Iterable[torch.nn.Parameter],
    global_batch: int,
    steps_per_epoch: int,
    backbone: Iterable[torch.nn.Parameter] = (),
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Build the optimizer over the trainable parameters, and its schedule (``scheduler.step()`` once per optimizer step).

    Those of ``parameters`` that are the ``backbone``'s are groups of their own if their learning rate differs, and biases and
    parameters of normalisation layers if they do not decay.
    """
    free = [parameter for parameter in parameters if parameter.requires_grad]
    lr = peak_lr(spec, global_batch)
    slow = set() if spec.backbone_lr_factor == 1.0 else {id(parameter) for parameter in backbone}
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for parameter in free:
        key = id(parameter) in slow, not spec.norm_decay and parameter.ndim <= 1
        groups.setdefault(key, {"params": [], **_rates(spec, lr, *key)})["params"].append(parameter)
    optimizer: torch.optim.Optimizer
    if spec.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups.values(), lr=lr, momentum=spec.momentum)
    else:
        # One kernel for all parameters, which counts the steps on the GPU; by default the host counts them.
        fused = True if all(parameter.is_cuda for parameter in free) else None
        optimizer = torch.optim.AdamW(groups.values(), lr=lr, betas=spec.betas, fused=fused)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(spec, step, steps_per_epoch))


def _rates(spec: OptimSpec, lr: float, backbone: bool, bare: bool) -> dict[str, Any]:
    """Return the options of a group of parameters, with marks (``BACKBONE``, ``BARE``) by which it is known again."""
    marks = {name: True for name, marked in ((BACKBONE, backbone), (BARE, bare)) if marked}
    decay = 0.0 if bare else spec.weight_decay
    return {"lr": lr * (spec.backbone_lr_factor if backbone else 1.0), "weight_decay": decay, **marks}


def reset_lr(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Set the learning rate of the next step to that of the schedule: a run that was saved at its end may go on with another
    milestone there."""
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)


def retune(state: dict[str, Any], spec: OptimSpec, global_batch: int, steps_per_epoch: int) -> None:
    """Change the learning rate, momentum (``betas``) and weight decay in a saved training state (``loop.save``) to those of
    another job, because a resumed optimizer keeps the saved ones. The groups of parameters must be the same in both."""
    groups = state["optimizer"]["param_groups"]
    factor = lr_factor(spec, state["step"], steps_per_epoch)
    for group in groups:
        options = _rates(spec, peak_lr(spec, global_batch), BACKBONE in group, BARE in group)
        group |= {**options, "initial_lr": options["lr"], "lr": options["lr"] * factor}
        group |= {name: getattr(spec, name) for name in ("momentum", "betas") if name in group}
    state["scheduler"] |= {name: [group[key] for group in groups] for name, key in _RATES.items()}
