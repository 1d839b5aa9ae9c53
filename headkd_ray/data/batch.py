"""Define the batch that data streams pass to the training engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headkd_ray.soft_targets import SoftTargets, ViewTargets, stack

TENSORS = ("images", "sizes", "boxes", "labels", "weights", "background", "image_ids", "original_sizes", "views")
"""Names of a Batch's tensor fields."""


@dataclass(frozen=True)
class Batch:
    """B images, padded on the right and bottom to the same (H, W), and their boxes. Treat the tensors as read-only: they may
    be views of a shared-memory block."""

    images: Tensor
    """uint8 (B, 3, H, W), RGB, zero-padded."""
    sizes: Tensor
    """int64 (B, 2): height and width of each image without padding, in pixels of the network input."""
    boxes: Tensor
    """float32 (B, G, 4): x1 y1 x2 y2 in pixels of the network input; rows of zeros as padding. No crowd boxes. G >= 1."""
    labels: Tensor
    """int64 (B, G): contiguous classes 0..C-1; -1 as padding."""
    weights: Tensor
    """float32 (B, G): loss weight of each box, 1 for ground truth and the score of a pseudo label; 0 = the box is ignored."""
    background: Tensor
    """bool (B,): whether what no box covers is background; False = nothing is known about it, as in unlabelled images."""
    image_ids: Tensor
    """int64 (B,): COCO image ids; -1 in an idle batch."""
    original_sizes: Tensor
    """int64 (B, 2): height and width of each stored image in pixels."""
    views: Tensor
    """int64 (B,): view number of each image; -1 in an idle batch and at evaluation."""
    step: int
    """Global micro-batch number, counted over all epochs; the same on every rank."""
    targets: SoftTargets | None = None
    """The teacher's outputs for the views, if they were computed before the batch arrived here."""
    ask: Any = None
    """A remote teacher to query for RoIs of this batch (``headkd_ray.distill.step_forward.AskTeacher``)."""
    teacher_restarts: int = 0
    """Number of this stream's teacher processes that were lost and restarted up to this batch."""
    idle: bool = False
    """Whether this rank has no image left for the step: it runs one blank image with a loss of 0 to keep DDP in step."""

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to ``device``, asynchronously if the batch is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """Copy the batch to page-locked memory (needs CUDA)."""
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors, so that their memory is not reused too early."""
        for tensor in [*self._tensors().values(), *(self.targets or ())]:
            tensor.record_stream(stream)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {name: function(tensor) for name, tensor in self._tensors().items()}
        return replace(self, targets=self.targets and self.targets.map(function), **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS}


@dataclass(frozen=True)
class Example:
    """One image as the network sees it, before padding."""

    image: NDArray[np.uint8]
    """uint8 (3, h, w), RGB."""
    boxes: NDArray[np.float32]
    """float32 (n, 4): x1 y1 x2 y2 in pixels of ``image``."""
    labels: NDArray[np.int64]
    """int64 (n,)."""
    image_id: int
    original_size: tuple[int, int]
    """Height and width of the stored image in pixels."""
    view: int = -1
    """Number of the view; -1 at evaluation and in an idle batch."""
    targets: ViewTargets | None = None
    """Soft targets from a cache; None without a cache."""
    weights: NDArray[np.float32] | None = None
    """float32 (n,): the loss weights of the boxes; None = 1 for all."""
    background: bool = True
    """Whether what no box covers is background."""


def collate(
    examples: Iterable[Example], step: int, pad: int, budget: int = 0, sizes: Sequence[tuple[int, int]] | None = None
) -> Batch:
    """Pad ``examples`` (at least one) to a common size, a multiple of ``pad`` pixels, and their targets, if all have any, to
    ``budget`` RoIs.

    It uses NumPy because in a prefetch thread each torch copy would start its own OpenMP team next to the training's.

    Args:
        sizes: heights and widths of the examples' images. With these, ``examples`` may be an iterator: each image is copied
            while it is in the processor's cache, and its memory is free for the next one.
    """
    if sizes is None:
        examples = list(examples)
        sizes = [(example.image.shape[1], example.image.shape[2]) for example in examples]
    height, width = (-(-max(sides) // pad) * pad for sides in zip(*sizes, strict=True))
    count = len(sizes)
    images = np.empty((count, 3, height, width), dtype=np.uint8)
    examples = [_placed(example, image, size) for example, image, size in zip(examples, images, sizes, strict=True)]
    most = max(1, max(len(example.boxes) for example in examples))
    targets = [example.targets for example in examples if example.targets is not None]
    boxes = np.zeros((count, most, 4), dtype=np.float32)
    labels = np.full((count, most), -1, dtype=np.int64)
    weights = np.ones((count, most), dtype=np.float32)
    for i, example in enumerate(examples):
        boxes[i, : len(example.boxes)] = example.boxes
        labels[i, : len(example.labels)] = example.labels
        if example.weights is not None:
            weights[i, : len(example.weights)] = example.weights
    return Batch(
        images=torch.from_numpy(images),
        sizes=torch.tensor(sizes, dtype=torch.int64),
        boxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights),
        background=torch.tensor([example.background for example in examples]),
        image_ids=torch.tensor([example.image_id for example in examples], dtype=torch.int64),
        original_sizes=torch.tensor([example.original_size for example in examples], dtype=torch.int64),
        views=torch.tensor([example.view for example in examples], dtype=torch.int64),
        step=step,
        targets=stack(targets, budget) if len(targets) == count else None,
    )


def _placed(example: Example, padded: NDArray[np.uint8], size: tuple[int, int]) -> Example:
    """Copy the example's image into ``padded``, uint8 (3, H, W), and return the example with the copy."""
    height, width = size
    image = padded[:, :height, :width]
    image[:] = example.image
    padded[:, :height, width:] = 0
    padded[:, height:] = 0
    return replace(example, image=image)


def joined(batches: Sequence[Batch]) -> Batch:
    """Return batches (at least one) of equal (H, W) and G, without targets, as a single batch."""
    if len(batches) == 1:
        return batches[0]
    tensors: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in TENSORS}
    return replace(batches[0], **tensors)


def idle_batch(step: int, side: int, pad: int) -> Batch:
    """Make a batch of one blank square image of about ``side`` pixels, for a rank that has no image left in ``step``."""
    side = -(-side // pad) * pad
    nothing = Example(
        image=np.zeros((3, side, side), dtype=np.uint8),
        boxes=np.zeros((0, 4), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int64),
        image_id=-1,
        original_size=(side, side),
    )
    return replace(collate([nothing], step, pad), idle=True)
