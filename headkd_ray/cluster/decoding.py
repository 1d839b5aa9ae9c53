"""The functions that run in the Ray tasks of a rank's batch stream: ``ReadWindow`` and ``DecodeChunk``.

They have a module of their own because every task process imports it: with the detectors and teachers that ``ray_stream``
needs, such a process would take five times as long to start (``python -X importtime -c "import headkd_ray.cluster.decoding"``).
"""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from headkd_ray.data.batch import TENSORS, Batch
from headkd_ray.data.batch_stream import BatchMaker, PendingBatch, load_window
from headkd_ray.data.shards import ShardSet
from headkd_ray.errors import UserError
from headkd_ray.soft_targets import SoftTargets

Row = dict[str, Any]

CHUNK_BYTES = 32 << 20
"""Target size of a chunk's decoded pixels; a chunk has at least one batch."""
CHUNK_IMAGES = 64
"""Maximum number of images in a chunk, however small: about 0.1 s of decoding, ten times a Ray task's overhead."""


@dataclass(frozen=True)
class ReadWindow:
    """A Ray Data function that reads a window and yields chunks of encoded images."""

    shards: ShardSet
    maker: BatchMaker

    def __call__(self, row: Row) -> Iterator[Row]:
        try:
            yield from map(_chunk_row, self._chunks(load_window(self.shards, pickle.loads(row["window"]), self.maker)))
        except UserError as error:
            yield {"chunk": b"", "error": pickle.dumps(error)}

    def _chunks(self, window: list[PendingBatch]) -> Iterator[list[PendingBatch]]:
        chunk: list[PendingBatch] = []
        images = size = 0
        for pending in window:
            more_images, more_size = len(pending.samples), self.maker.pixels(pending)
            if chunk and (images + more_images > CHUNK_IMAGES or size + more_size > CHUNK_BYTES):
                yield chunk
                chunk, images, size = [], 0, 0
            chunk.append(pending)
            images, size = images + more_images, size + more_size
        yield chunk


def _chunk_row(chunk: list[PendingBatch]) -> Row:
    return {"chunk": pickle.dumps(chunk), "error": b""}


@dataclass(frozen=True)
class DecodeChunk:
    """A Ray Data function that decodes a chunk into batches."""

    maker: BatchMaker

    def __call__(self, row: Row) -> Row:
        torch.set_num_threads(1)  # a task has one CPU
        if row["error"]:
            return {"head": b"", "pixels": b"", "error": row["error"]}
        try:
            return {**encode([self.maker(pending) for pending in pickle.loads(row["chunk"])]), "error": b""}
        except UserError as error:
            return {"head": b"", "pixels": b"", "error": pickle.dumps(error)}


def encode(batches: list[Batch]) -> Row:
    """Encode batches as one row: ``head`` (pickled, all but pixels) and ``pixels`` (bytes of all images, end to end)."""
    small = [name for name in TENSORS if name != "images"]
    heads = [
        (
            {"step": batch.step, "idle": batch.idle},
            tuple(batch.images.shape),
            {name: getattr(batch, name).numpy() for name in small},
            None if batch.targets is None else [tensor.numpy() for tensor in batch.targets],
        )
        for batch in batches
    ]
    return {"head": pickle.dumps(heads), "pixels": b"".join(batch.images.numpy().data for batch in batches)}


def decoded(head: bytes, pixels: pa.Buffer | bytes) -> Iterator[Batch]:
    """Yield the batches of an encoded row; their ``images`` are views of ``pixels`` and keep it alive."""
    # torch warns that shared memory is read-only. A Batch is read-only by contract, and a copy would cost memory bandwidth.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
    whole = np.frombuffer(pixels, dtype=np.uint8)
    end = 0
    for fields, shape, small, targets in pickle.loads(head):
        start, end = end, end + math.prod(shape)
        images = torch.from_numpy(whole[start:end]).view(shape)
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in small.items()}
        soft = None if targets is None else SoftTargets(*map(torch.from_numpy, targets))
        yield Batch(images=images, targets=soft, **fields, **tensors)
