"""The part "steps" of ``bench/gpu.sh``: what one training step costs, method by method, compared with torchvision's detectors.

Batches lie on the device, so that loading data plays no part. A step is forward pass, backward pass, clipping and optimizer as
in ``engine.step.train_step``; torchvision's is that of its reference training loop, on the same images, widths and autocast.
Weights are random, which changes no shapes except how many boxes NMS leaves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torchvision
from gpu_measure import busy_milliseconds, synchronisations, tera_operations
from gpu_recipes import fresh_teacher, noise_batch, recipe
from gpu_results import Results, Row, Setting, setting
from noise import CLASSES
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from headkd_ray.data.batch import Batch
from headkd_ray.detectors import PyramidDetector
from headkd_ray.distill import build_training_model
from headkd_ray.engine.optim import build_optimizer
from headkd_ray.job import Job
from headkd_ray.teacher import soft_teacher

BATCHES = 4
"""Number of different batches, used in turn."""
WARM_UP, MOST_STEPS, MOST_SECONDS = 3, 20, 4.0
PARTS = ("forward", "backward", "update")


@dataclass(frozen=True)
class Case:
    """A row of the table: one of our jobs, or torchvision's detector of the same size."""

    name: str
    job: str
    keys: tuple[str, ...] = ()
    given: bool = False
    """Whether soft targets come with the batches, as from a cache or a pool."""
    torchvision: bool = False


TEACHERS_ROIS = ("distill.rois=teacher",)
CASES = (
    Case("RetinaNet R18, alone", "baseline"),
    Case("torchvision RetinaNet R18", "baseline", torchvision=True),
    Case("HEAD inline", "head"),
    Case("HEAD cache or pool", "head", TEACHERS_ROIS, given=True),
    Case("assist", "assist"),
    Case("AKD", "akd"),
    Case("TF-HEAD", "tf_head"),
    Case("HEAD inline, teacher's RoIs", "head", TEACHERS_ROIS),
    Case("Faster R-CNN R50, alone", "teacher"),
    Case("torchvision Faster R-CNN R50", "teacher", torchvision=True),
)


class Step:
    """A training step whose parts can be timed separately. Call it for a whole step, or its parts in order."""

    def __init__(self, case: Case, precision: str, place: Setting) -> None:
        images, side = (2, 64) if place.tiny else (16, 640)
        self.job = recipe(case.job, *case.keys, f"data.batch_size={images}", f"optim.precision={precision}", tiny=place.tiny)
        self.device, self.images, self.bf16 = place.device, images, precision == "bf16"
        batches = [noise_batch(number, images, side, place.device) for number in range(BATCHES)]
        forward = _torchvision if case.torchvision else _ours
        self.model, self.losses = forward(case, self.job, batches, place)
        self.optimizer, _ = build_optimizer(self.job.optim, self.model.parameters(), images, steps_per_epoch=1000)
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


Losses = Callable[[int], dict[str, Tensor]]
"""A function from a batch's number to its losses."""


def _ours(case: Case, job: Job, batches: list[Batch], place: Setting) -> tuple[nn.Module, Losses]:
    teacher: PyramidDetector | None = fresh_teacher(place.tiny) if job.teacher is not None else None
    model = build_training_model(job, CLASSES, teacher, steps_per_epoch=1000)
    model.to(place.device).to(memory_format=torch.channels_last).train()
    late = job.distill.warmup_steps  # past every warm-up, so that all losses count
    asked = None
    if teacher is not None and job.distill.rois == "teacher":
        asked = soft_teacher(job, teacher, place.device)
    given = [asked(batch) for batch in batches] if case.given and asked is not None else None

    def losses(number: int) -> dict[str, Tensor]:
        batch = batches[number]
        if given is not None:
            batch = replace(batch, targets=given[number])
        elif asked is not None:
            batch = replace(batch, targets=asked(batch))
        return model(batch, late)

    return model, losses


def _torchvision(case: Case, job: Job, batches: list[Batch], place: Setting) -> tuple[nn.Module, Losses]:
    side = batches[0].images.shape[-1]
    sizes: dict[str, Any] = {"min_size": side, "max_size": side}
    model: nn.Module
    if case.job == "teacher":
        models = torchvision.models.detection
        model = models.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES + 1, **sizes)
    else:
        # Like ours: stem and C2 are frozen, and P6 is made from C5.
        levels: dict[str, Any] = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(512, 256)}
        body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3, **levels)
        model = torchvision.models.detection.RetinaNet(body, CLASSES, **sizes)
    model.to(place.device).to(memory_format=torch.channels_last).train()
    first = int(case.job == "teacher")  # torchvision's Faster R-CNN counts the background as class 0
    images = [[image.float() / 255 for image in batch.images] for batch in batches]
    truth = [
        [{"boxes": boxes, "labels": labels + first} for boxes, labels in zip(batch.boxes, batch.labels, strict=True)]
        for batch in batches
    ]
    return model, lambda number: model(images[number], truth[number])


def measure(case: Case, precision: str, place: Setting) -> Row:
    """Measure one row."""
    row: Row = {"case": case.name, "torchvision": case.torchvision, "precision": precision}
    step = Step(case, precision, place)
    for _ in range(1 if place.tiny else WARM_UP):
        step()
    on_gpu = place.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(place.device)
    times = list(_timed(step, 2 if place.tiny else MOST_STEPS))
    parts = {part: median(each[number] for each in times) for number, part in enumerate(PARTS)}
    milliseconds = median(sum(each) for each in times)
    row |= {"images": step.images, "ms": milliseconds, "images_per_second": 1e3 * step.images / milliseconds, "parts_ms": parts}
    row["steps"] = len(times)
    looks: dict[str, Callable[[], object]] = {"tera_operations": lambda: tera_operations(step)}
    if on_gpu:
        row["peak_gib"] = torch.cuda.max_memory_allocated(place.device) / 2**30
        looks |= {"syncs": lambda: synchronisations(step), "busy": lambda: busy_milliseconds(step) / milliseconds}
    for name, look in looks.items():
        try:
            row[name] = look()
        except Exception as error:  # the times are worth having without it
            row[name], row[f"{name}_error"] = None, repr(error)
    return row


def _timed(step: Step, most: int) -> Iterator[tuple[float, ...]]:
    """Yield the milliseconds of each part for up to ``most`` steps, or fewer if they take long."""
    started = time.perf_counter()
    for number in range(most):
        if number >= 2 and time.perf_counter() - started > MOST_SECONDS:
            return
        clock = _Clock(step.device)
        total = step.forward()
        clock.lap()
        step.backward(total)
        clock.lap()
        step.update()
        clock.lap()
        yield clock.laps()


class _Clock:
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


def main() -> int:
    """Measure as many rows as time allows; return 1 if one failed."""
    place = setting()
    results = Results("steps", place)
    results.content["ceilings"] = ceilings(place)
    failed = False
    for precision in ("bf16", "fp32"):
        for case in CASES:
            if place.left() < 10:
                print("no time left for the remaining rows", flush=True)
                return 1
            try:
                results.add(measure(case, precision, place))
            except Exception as error:  # the remaining rows are still worth having
                failed = True
                results.add({"case": case.name, "torchvision": case.torchvision, "precision": precision, "error": repr(error)})
            if place.device.type == "cuda":
                torch.cuda.empty_cache()
    return int(failed)


def ceilings(place: Setting) -> Row:
    """Measure the device's peaks: bf16 matrix products, in TFLOP/s; copies within its memory, in TB/s read and written."""
    side, size = (256, 1 << 20) if place.tiny else (8192, 1 << 32)
    one, other = (torch.randn(side, side, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(8):
            clock = _Clock(place.device)
            work()
            clock.lap()
            times.append(clock.laps()[0] / 1e3)
        return median(times[3:])

    product, copy = seconds(lambda: one @ other), seconds(lambda: target.copy_(source))
    return {"bf16_tflops": 2 * side**3 / product / 1e12, "copy_tb_per_second": 2 * size / copy / 1e12}


if __name__ == "__main__":
    sys.exit(main())
