"""Every method with every kind of detector that it trains, at micro size, and one step of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headkd_ray.detectors import build_detector
from headkd_ray.distill import TrainingModel, build_training_model
from headkd_ray.job import Job
from tests.detectors.micro import (
    batch,
    cascade_spec,
    faster_rcnn_spec,
    fcos_spec,
    gfl_spec,
    liven,
    reppoints_spec,
    retinanet_spec,
    whole,
)

CLASSES = 3
EVERYTHING = {"size": 1 << 16, "positive_fraction": 1.0}
"""A sampler that takes all candidates, because random samples differ between devices."""
ROI = {"sampler": EVERYTHING}


def _two_stage(spec: Any) -> dict[str, Any]:
    keys = spec.model_dump()
    keys["rpn"]["sampler"] |= EVERYTHING
    return keys


KINDS: dict[str, dict[str, Any]] = {
    "retinanet": retinanet_spec().model_dump(),
    "fcos": fcos_spec().model_dump(),
    "gfl": gfl_spec().model_dump(),
    "reppoints": reppoints_spec().model_dump(),
    "faster_rcnn": _two_stage(faster_rcnn_spec(**ROI)),
    "cascade_rcnn": _two_stage(cascade_spec(**ROI)),
}
HELPERS = {
    "fcos": {"head": fcos_spec(channels=8).head.model_dump()},
    "rcnn": {"head": faster_rcnn_spec(**ROI).roi.model_dump()},
    "retinanet": {"head": retinanet_spec(channels=12).head.model_dump()},
}
"""Assistants for TF-HEAD."""
PAIRS: list[tuple[str, str, str | None]] = [
    *(("supervised", kind, None) for kind in KINDS),
    *(("assist", kind, None) for kind in KINDS),
    *((method, kind, "faster_rcnn") for method in ("copy_only", "akd", "head") for kind in KINDS),
    *(("head", "retinanet", kind) for kind in KINDS if kind != "faster_rcnn"),
    ("fitnet", "retinanet", "retinanet"),
    *(("tf_head", kind, None) for kind in ("retinanet", "fcos", "faster_rcnn")),
]
"""(method, student, teacher), for every kind that a method trains."""


def model_of(method: str, student: str, teacher: str | None) -> TrainingModel:
    """Return the model on the CPU, with the same weights in every call."""
    distill: dict[str, Any] = {"warmup_steps": 0}
    if method == "assist":
        distill["assistant"] = faster_rcnn_spec(**ROI).roi.model_dump()
    if method == "tf_head":
        distill["assistants"] = {name: helper for name, helper in HELPERS.items() if name != student}
    job = _job(method, student, teacher=None if teacher is None else {"checkpoint": "c"}, distill=distill)
    torch.manual_seed(11)
    heavy = None
    if teacher is not None:
        heavy = build_detector(_job("supervised", teacher).student, CLASSES)
        liven(heavy)
    model = build_training_model(job, CLASSES, heavy, steps_per_epoch=10)
    liven(model, seed=1)
    return model.train()


def _job(method: str, student: str, **sections: Any) -> Job:
    data = {"train": "t", "val": "v"}
    return Job.model_validate({"run": {"name": "test"}, "method": method, "data": data, "student": KINDS[student], **sections})


def step(model: TrainingModel, device: torch.device, precision: str = "fp32") -> dict[str, Tensor]:
    """Return the losses of one forward pass on ``device``, after which every parameter has its gradient."""
    model.to(device).to(memory_format=torch.channels_last)
    data = {name: tensor.to(device) for name, tensor in batch().items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        losses: dict[str, Tensor] = model(whole(data), 5)
    torch.stack(list(losses.values())).sum().backward()
    return losses
