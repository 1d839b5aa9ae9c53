"""Inference on single images, with the same view, normalisation and post-processing as in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from headkd_ray.data.batch import Batch, Example, collate
from headkd_ray.data.images import FULL_RANGE
from headkd_ray.data.views import apply_view, eval_view
from headkd_ray.detectors import Detector
from headkd_ray.engine.evaluation import coco_results
from headkd_ray.errors import CheckpointError
from headkd_ray.job import DataSpec


def view_spec(meta: Mapping[str, Any]) -> DataSpec:
    """Return how a checkpoint's images are resized and padded: as recorded in ``meta["data"]``, else the paper's sizes.

    Raises:
        CheckpointError: the recorded value is not valid.
    """
    try:
        return DataSpec.model_validate({"train": "none", "val": "none", **meta.get("data", {})})
    except (ValidationError, TypeError) as error:
        raise CheckpointError(f"model.json: meta.data {meta.get('data')!r} does not describe an image size: {error}") from error


def trained_range(meta: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the value range with which a checkpoint's 16-bit training images were read; None if it had none.

    Raises:
        CheckpointError: the recorded value is not such a range.
    """
    match meta.get("value_range"):
        case None:
            return None
        case [int(low), int(high)] if FULL_RANGE[0] <= low < high <= FULL_RANGE[1]:
            return low, high
    raise CheckpointError(f"model.json: meta.value_range {meta['value_range']!r} is not a range of 16-bit values")


@torch.inference_mode()
def detect_images(
    detector: Detector, images: Sequence[Tensor], spec: DataSpec, category_ids: Sequence[int], device: torch.device
) -> Iterator[list[dict[str, Any]]]:
    """Yield COCO results for each image (``image_id`` is its position), best first, boxes xywh in pixels of that image.

    Args:
        images: uint8 (3, H, W), RGB, of any sizes; they pass through the network one at a time.
    """
    detector.eval()
    for position, image in enumerate(images):
        batch = batch_of(image, spec, position).to(device)
        yield coco_results(detector(batch.images, batch.sizes), batch, category_ids)[0]


def batch_of(image: Tensor, spec: DataSpec, image_id: int = 0, canvas: tuple[int, int] | None = None) -> Batch:
    """Return ``image`` (3, H, W) uint8, RGB, as evaluation shows it: a batch of one, on the CPU.

    Args:
        canvas: height and width of the batch in pixels, into which the image is made to fit; None = as its size requires.
    """
    nothing, height, width = np.zeros((0, 4), np.float32), image.shape[1], image.shape[2]
    shown, _ = apply_view(image, nothing, replace(eval_view(spec), canvas=canvas))
    batch = collate([Example(shown, nothing, np.zeros(0, np.int64), image_id, (height, width))], step=0, pad=spec.pad)
    if canvas is None:
        return batch
    missing = (canvas[1] - batch.images.shape[3], canvas[0] - batch.images.shape[2])
    return replace(batch, images=F.pad(batch.images, (0, missing[0], 0, missing[1])))
