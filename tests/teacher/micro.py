"""A small teacher that chooses its own RoIs, and drawn views for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from headkd_ray.data.batch import Batch, Example, collate
from headkd_ray.detectors import FasterRCNN, build_detector
from headkd_ray.teacher import SoftTeacher
from tests.detectors.micro import faster_rcnn_spec, liven

BUDGET, SEED, PAD = 24, 5, 32
LAYERS, WIDTH = 2, 24
SHAPES = ((64, 96, 2), (50, 60, 1), (64, 90, 0), (96, 64, 3), (33, 90, 2), (60, 96, 4))
"""Height, width and number of objects of the drawn views: four padded sizes, three views of one of them."""


def detector_of(**roi: Any) -> FasterRCNN:
    torch.manual_seed(3)
    detector = build_detector(faster_rcnn_spec(**roi), 3)
    liven(detector)
    assert isinstance(detector, FasterRCNN)
    return detector.train()


def teacher_of(budget: int = BUDGET, seed: int = SEED, precision: str = "fp32", **roi: Any) -> SoftTeacher:
    return SoftTeacher(detector_of(**roi), budget, seed, PAD, precision)


def example(number: int, height: int, width: int, objects: int) -> Example:
    """Return noise with boxes in it; image 100 + ``number``, view ``number`` modulo 3."""
    rng = np.random.default_rng(number)
    corners = rng.uniform(0, 0.5, (objects, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.2, 0.5, (objects, 2))], axis=1) * np.array([width, height] * 2)
    return Example(
        image=rng.integers(0, 256, (3, height, width), dtype=np.uint8),
        boxes=boxes.astype(np.float32),
        labels=rng.integers(0, 3, objects),
        image_id=100 + number,
        original_size=(height, width),
        view=number % 3,
    )


def examples() -> list[Example]:
    return [example(number, *shape) for number, shape in enumerate(SHAPES)]


def batch_of(*views: Example) -> Batch:
    return collate(views, step=0, pad=PAD)
