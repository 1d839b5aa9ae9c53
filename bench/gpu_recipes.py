"""The shipped jobs as ``bench/gpu.sh`` measures them: without downloads, on noise, at sizes of its own."""

from __future__ import annotations

from typing import Any

import torch
from noise import CLASSES
from revision import ROOT
from torch import Tensor

from headkd_ray.data.batch import Batch
from headkd_ray.detectors import PyramidDetector, build_detector
from headkd_ray.job import Job, load_job

NAMES = tuple(f"class {number}" for number in range(1, CLASSES + 1))


def recipe(name: str, *keys: str, tiny: bool) -> Job:
    """Load ``jobs/<name>.yaml``, or its micro version from ``jobs/small``, with random weights and some keys changed."""
    folder = ROOT / "jobs" / ("small" if tiny else "")
    # This learning rate costs as much work as any other, and at it no loss explodes.
    job = load_job(folder / f"{name}.yaml", ["optim.lr=1e-7", "log.tensorboard=false", *keys])
    return job.replace({"student.backbone.weights": "none"})  # frozen or not: a job file must not freeze random weights


def fresh_teacher(tiny: bool) -> PyramidDetector:
    """Build the recipes' teacher with random weights, the same ones in every call. Trained weights would cost the same."""
    torch.manual_seed(0)
    teacher = build_detector(recipe("teacher", tiny=tiny).student, CLASSES)
    assert isinstance(teacher, PyramidDetector)
    return teacher


def noise_batch(number: int, images: int, side: int, device: torch.device) -> Batch:
    """Return a batch of square images with 8 random boxes each, all on the device."""
    generator = torch.Generator().manual_seed(number)

    def drawn(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    size = drawn(side / 16, side / 2, images, 8, 2)
    corner = drawn(0, 1, images, 8, 2) * (side - size)
    fields: dict[str, Any] = {
        "images": torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator),
        "sizes": torch.full((images, 2), side),
        "boxes": torch.cat([corner, corner + size], dim=2),
        "labels": torch.randint(0, CLASSES, (images, 8), generator=generator),
        "weights": torch.ones(images, 8),
        "background": torch.ones(images, dtype=torch.bool),
        "image_ids": torch.arange(images) + number * images,
        "original_sizes": torch.full((images, 2), side),
        "views": torch.zeros(images, dtype=torch.int64),
    }
    return Batch(**fields, step=number).to(device)
