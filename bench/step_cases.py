"""The training steps that benchmarks measure: each method's, and those of torchvision's detectors of the same size.

Batches lie on the device, so that loading data plays no part. A step is forward pass, backward pass, clipping and optimizer as
in ``engine.step.train_step``; torchvision's is that of its reference training loop, on the same images, widths and autocast.
Weights are random, which changes no shapes except how many boxes NMS leaves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchvision
from gpu_recipes import fresh_teacher, noise_batch, recipe
from noise import CLASSES
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from headkd_ray.data.batch import Batch
from headkd_ray.detectors import PyramidDetector
from headkd_ray.distill import build_training_model
from headkd_ray.engine.compiling import compile_modules
from headkd_ray.engine.optim import build_optimizer
from headkd_ray.job import Job
from headkd_ray.teacher import soft_teacher

BATCHES = 4
"""Number of different batches, used in turn."""
PARTS = ("forward", "backward", "update")
PLAIN, PLAIN_TWO_STAGE = "RetinaNet R18, alone", "Faster R-CNN R50, alone"


@dataclass(frozen=True)
class Size:
    """How large a step is, and where and at which precision it runs."""

    device: torch.device
    images: int
    side: int
    """Side of the square images, in pixels."""
    precision: str = "fp32"
    tiny: bool = False
    """Whether micro models are measured, in a rehearsal."""


@dataclass(frozen=True)
class Case:
    """A row of the table: one of our jobs, or torchvision's detector of the same size."""

    name: str
    job: str
    keys: tuple[str, ...] = ()
    given: bool = False
    """Whether soft targets come with the batches, as from a cache or a pool."""
    torchvision: bool = False
    compiled: bool = False
    """Whether modules are compiled as with ``optim.compile: default``."""


TEACHERS_ROIS = ("distill.rois=teacher",)
CASES = (
    Case(PLAIN, "baseline"),
    Case("torchvision RetinaNet R18", "baseline", torchvision=True),
    Case("HEAD inline", "head"),
    Case("HEAD cache or pool", "head", TEACHERS_ROIS, given=True),
    Case("assist", "assist"),
    Case("AKD", "akd"),
    Case("TF-HEAD", "tf_head"),
    Case("HEAD inline, teacher's RoIs", "head", TEACHERS_ROIS),
    Case(PLAIN_TWO_STAGE, "teacher"),
    Case("torchvision Faster R-CNN R50", "teacher", torchvision=True),
    Case("RetinaNet R18, compiled", "baseline", compiled=True),
    Case("HEAD inline, compiled", "head", compiled=True),
)


class Step:
    """A training step whose parts can be timed separately. Call it for a whole step, or its parts in order."""

    def __init__(self, case: Case, size: Size) -> None:
        keys = (*case.keys, f"data.batch_size={size.images}", f"optim.precision={size.precision}")
        self.job = recipe(case.job, *keys, tiny=size.tiny)
        self.device, self.images, self.bf16 = size.device, size.images, size.precision == "bf16"
        batches = [noise_batch(number, size.images, size.side, size.device) for number in range(BATCHES)]
        forward = _torchvision if case.torchvision else _ours
        self.model, self.losses = forward(case, self.job, batches, size)
        self.optimizer, _ = build_optimizer(self.job.optim, self.model.parameters(), size.images, steps_per_epoch=1000)
        self.number = 0

    def forward(self) -> Tensor:
        """Return the total loss of the next batch."""
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.losses(self.number % BATCHES)
        return torch.stack(list(losses.values())).sum()

    def backward(self, total: Tensor) -> None:
        total.backward()

    def update(self) -> None:
        if self.job.optim.clip_norm is not None:
            clip_grad_norm_(self.model.parameters(), self.job.optim.clip_norm)
        self.optimizer.step()

    def __call__(self) -> None:
        self.backward(self.forward())
        self.update()

    def timed(self) -> tuple[float, ...]:
        """Take a step and return the milliseconds of each of its parts."""
        clock = Clock(self.device)
        total = self.forward()
        clock.lap()
        self.backward(total)
        clock.lap()
        self.update()
        clock.lap()
        return clock.laps()


Losses = Callable[[int], dict[str, Tensor]]
"""A function from a batch's number to its losses."""


def _ours(case: Case, job: Job, batches: list[Batch], size: Size) -> tuple[nn.Module, Losses]:
    teacher: PyramidDetector | None = fresh_teacher(size.tiny) if job.teacher is not None else None
    model = build_training_model(job, CLASSES, teacher, steps_per_epoch=1000)
    model.to(size.device).to(memory_format=torch.channels_last).train()
    if case.compiled:
        compile_modules(model, "default")
    late = job.distill.warmup_steps  # past every warm-up, so that all losses count
    asked = None
    if teacher is not None and job.distill.rois == "teacher":
        asked = soft_teacher(job, teacher, size.device)
    given = [asked(batch) for batch in batches] if case.given and asked is not None else None

    def losses(number: int) -> dict[str, Tensor]:
        batch = batches[number]
        if given is not None:
            batch = replace(batch, targets=given[number])
        elif asked is not None:
            batch = replace(batch, targets=asked(batch))
        return model(batch, late)

    return model, losses


def _torchvision(case: Case, job: Job, batches: list[Batch], size: Size) -> tuple[nn.Module, Losses]:
    sizes: dict[str, Any] = {"min_size": size.side, "max_size": size.side}
    model: nn.Module
    if case.job == "teacher":
        models = torchvision.models.detection
        model = models.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES + 1, **sizes)
    else:
        # Like ours: stem and C2 are frozen, and P6 is made from C5.
        levels: dict[str, Any] = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(512, 256)}
        body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3, **levels)
        model = torchvision.models.detection.RetinaNet(body, CLASSES, **sizes)
    # Its reference loop does not use channels-last memory, which makes convolutions faster; here both have it.
    model.to(size.device).to(memory_format=torch.channels_last).train()
    first = int(case.job == "teacher")  # torchvision's Faster R-CNN counts the background as class 0
    images = [[image.float() / 255 for image in batch.images] for batch in batches]
    truth = [
        [{"boxes": boxes, "labels": labels + first} for boxes, labels in zip(batch.boxes, batch.labels, strict=True)]
        for batch in batches
    ]
    return model, lambda number: model(images[number], truth[number])


class Clock:
    """A stopwatch of device time. On a GPU it records events in the queue, and the host waits only when all laps are over."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []
        self.lap()

    def lap(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> tuple[float, ...]:
        """Return the milliseconds between consecutive marks."""
        if not self.on_gpu:
            return tuple(1e3 * (after - before) for before, after in zip(self.marks, self.marks[1:], strict=False))
        self.marks[-1].synchronize()
        return tuple(before.elapsed_time(after) for before, after in zip(self.marks, self.marks[1:], strict=False))
