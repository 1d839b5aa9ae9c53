"""Encoding of a view's soft targets as bytes: features in 16 or 8 bits, class logits in 16.

In 8 bits they are stored channel by channel, with a scale for each channel. The features of an R-CNN are outputs of a ReLU,
never negative and many of them 0: channels that are 0 for all RoIs form long runs, which Parquet compresses well. Those of
other teachers may be negative; their 8 bits have a sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headkd_ray.soft_targets import TopLogits, ViewTargets

LEVELS, SIGNED_LEVELS = 255, 127
"""Number of quantisation steps from 0 to the greatest 8-bit feature; with a sign, as many below 0."""


@dataclass(frozen=True)
class Codec:
    """How features and class logits are encoded."""

    dtype: Literal["fp16", "int8"]
    layers: int
    width: int
    logits: int = 0
    """Number of class logits kept for each RoI."""
    signed: bool = False
    """Whether features may be negative."""

    @property
    def limit(self) -> float:
        """Largest feature that can be stored."""
        return float(np.finfo(np.float16 if self.dtype == "fp16" else np.float32).max)

    def scales(self, views: Sequence[ViewTargets]) -> NDArray[np.float32]:
        """Return the step size (L, D) of each channel for the ``views`` of a row group; ones for fp16."""
        most = np.zeros((self.layers, self.width), dtype=np.float32)
        if self.dtype == "fp16":
            return most + 1
        for view in views:
            if len(view.boxes):
                np.maximum(most, np.abs(view.taps).max(axis=1), out=most)
        steps = most / self._levels
        return np.where(steps > 0, steps, 1).astype(np.float32)

    def pack(self, view: ViewTargets, scales: NDArray[np.float32]) -> bytes:
        """Encode the features (L, k, D) of a view."""
        if self.dtype == "fp16":
            return view.taps.astype("<f2").tobytes()
        least = -self._levels if self.signed else 0
        steps = np.rint(view.taps / scales[:, None]).clip(least, self._levels).astype(self._byte)
        return steps.transpose(0, 2, 1).tobytes()

    def unpack(self, packed: bytes, count: int, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """Decode the features (L, k, D) of ``count`` = k RoIs."""
        if self.dtype == "fp16":
            return np.frombuffer(packed, dtype="<f2").reshape(self.layers, count, self.width).astype(np.float32)
        steps = np.frombuffer(packed, dtype=self._byte).reshape(self.layers, self.width, count)
        return np.ascontiguousarray(steps.transpose(0, 2, 1)) * scales[:, None]

    @property
    def _levels(self) -> int:
        return SIGNED_LEVELS if self.signed else LEVELS

    @property
    def _byte(self) -> type[np.int8] | type[np.uint8]:
        return np.int8 if self.signed else np.uint8

    def pack_top(self, top: TopLogits) -> tuple[bytes, bytes]:
        """Encode the logits (k, M) and classes (k, M) of a view."""
        return top.logits.astype("<f2").tobytes(), top.classes.astype("<u2").tobytes()

    def unpack_top(self, logits: bytes, classes: bytes, count: int) -> TopLogits:
        """Decode the logits and classes of ``count`` = k RoIs."""
        shape = (count, self.logits)
        return TopLogits(
            np.frombuffer(logits, dtype="<f2").reshape(shape).astype(np.float32),
            np.frombuffer(classes, dtype="<u2").reshape(shape).astype(np.int64),
        )
