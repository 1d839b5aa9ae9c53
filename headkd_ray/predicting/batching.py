"""Pass images through the network several at a time, and give their detections in the order of the images."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from headkd_ray.data.batch import Batch, joined
from headkd_ray.deploy.detections import ImageDetections
from headkd_ray.deploy.predictor import Predictor
from headkd_ray.memory import enough_memory

Item = TypeVar("Item")

AHEAD = 3
"""Batches' worth of images among which those of one size are looked for."""


@dataclass
class Shown(Generic[Item]):
    """An image on its way through the network."""

    item: Item
    """What the caller knows the image by."""
    pixels: Tensor | None
    """uint8 (3, H, W), RGB, until they are made a batch; None = the image could not be read."""
    found: ImageDetections | None = None
    """Its detections, once the network has seen it."""
    batch: Batch | None = None
    """The image as the network is given it, until it has seen it."""


Size = tuple[int, ...]


class _Waiting(Generic[Item]):
    """Images that wait for others of the same padded size."""

    def __init__(self, predictor: Predictor, batch_size: int) -> None:
        self.predictor, self.batch_size = predictor, batch_size
        self.groups: dict[Size, list[Shown[Item]]] = {}

    def add(self, image: Shown[Item]) -> None:
        """Detect in the image's group if it is complete with the image."""
        assert image.pixels is not None
        image.batch, image.pixels = self.predictor.batch(image.pixels), None
        group = self.groups.setdefault(_size(image.batch), [])
        group.append(image)
        if len(group) == self.batch_size:
            self.detect(image)

    def detect(self, image: Shown[Item]) -> None:
        """Detect in the group of a waiting image."""
        assert image.batch is not None
        group = self.groups.pop(_size(image.batch))
        batch = joined([each.batch for each in group if each.batch is not None])
        remedy = f"lower --batch-size ({self.batch_size}), or set CUDA_VISIBLE_DEVICES= to use the CPU"
        with enough_memory(f"detecting in {len(group)} images of {batch.images.shape[3]} x {batch.images.shape[2]}", remedy):
            for each, found in zip(group, self.predictor.detect_batch(batch), strict=True):
                each.found, each.batch = found, None


def detect_in_order(predictor: Predictor, images: Iterable[Shown[Item]], batch_size: int) -> Iterator[Shown[Item]]:
    """Detect in images, up to ``batch_size`` of one padded size together, and yield them in their order.

    An image without pixels is passed on as it is. About AHEAD batches are in memory at a time.

    Raises:
        DeviceMemoryError: a batch needs more memory than is available.
    """
    waiting = _Waiting[Item](predictor, batch_size)
    order: deque[Shown[Item]] = deque()
    for image in images:
        order.append(image)
        if image.pixels is not None:
            waiting.add(image)
        if len(order) > AHEAD * batch_size and order[0].batch is not None:
            waiting.detect(order[0])
        while order and order[0].batch is None:
            yield order.popleft()
    while order:
        if order[0].batch is not None:
            waiting.detect(order[0])
        yield order.popleft()


def _size(batch: Batch) -> Size:
    return tuple(batch.images.shape[2:])
