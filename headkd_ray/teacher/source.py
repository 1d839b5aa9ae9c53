"""The contract of a teacher that chooses its own RoIs: from a batch of views to soft targets.

What such a teacher says depends on a view alone, so it can run in the train worker, in a pool, or once beforehand with its
answers cached. Everything that runs, stores, verifies, times or compares them knows only this contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from headkd_ray.data.batch import Batch
from headkd_ray.detectors import PyramidDetector
from headkd_ray.detectors.two_stage import answers_about_rois
from headkd_ray.job import RoIHeadSpec
from headkd_ray.soft_targets import SoftTargets


@dataclass(frozen=True)
class QueryFeatures:
    """The rows of features that a source without a head of ours gives for RoIs, described as a head describes its own."""

    spec: RoIHeadSpec
    """The head of an assistant that is compared with them, if the job describes none."""
    tap_channels: Sequence[int]
    """Width of each layer's features, the last layer being that which CKD reads."""

    @property
    def lead_channels(self) -> int:
        """Width of the last layer's features."""
        return self.tap_channels[-1]


class TeacherSource(ABC):
    """A frozen teacher that answers with RoIs of its own, and with its features of each. K is the RoI budget of a view.

    It gets raw pixels: how it resizes and normalises them is its own affair. Boxes are in pixels of the view.
    """

    budget: int
    """K: the largest number of RoIs per view."""
    layers: int
    """L: the number of layers whose features it gives."""
    width: int
    """D: the width of a feature."""
    signed: bool
    """Whether features may be negative; otherwise they are outputs of a ReLU."""
    num_classes: int
    """Number of the data's classes."""
    num_logits: int
    """The largest number of class logits that it can give for a RoI, background included."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that the teacher is on, where the batches must be."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move the teacher to ``device``, and return it."""

    @property
    @abstractmethod
    def detection_head(self) -> Any:
        """What describes its features: a head of ours, or :class:`QueryFeatures`."""

    @abstractmethod
    def recipe(self, logits: bool) -> dict[str, Any]:
        """Return what its answers depend on, by the job keys that a user would change, with JSON values.

        ``logits``: whether the class logits count as well.
        """

    @abstractmethod
    def __call__(self, batch: Batch) -> SoftTargets:
        """Compute the soft targets of ``batch``; for an idle batch they are all padding.

        A view's RoIs do not depend on the others in its batch, except for rounding errors.
        """

    @abstractmethod
    def with_logits(self, batch: Batch, count: int) -> tuple[SoftTargets, Tensor, Tensor]:
        """Compute the soft targets of ``batch`` and, for each RoI, its ``count`` = M greatest class logits, greatest first.

        Returns the targets, the logits float32 (B, K, M) and their classes int64 (B, K, M): contiguous classes of the data,
        C = background.
        """

    @abstractmethod
    def answers_at(self, batch: Batch, boxes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the features (L, k, D) at ``boxes`` (k, 4), RoIs that it chose before, in a ``batch`` of one view.

        Returns them with the ``count`` = M greatest class logits (k, M) and their classes (k, M).
        """

    def nothing(self, views: int) -> SoftTargets:
        """Return soft targets that are all padding for so many views."""
        return SoftTargets.empty(views, self.budget, self.layers, self.width, self.device)


AnyTeacher = PyramidDetector | TeacherSource
"""A teacher as it is loaded: a detector of ours, of which some can be a source as well, or a source."""


def can_choose_rois(teacher: AnyTeacher) -> bool:
    """Return whether ``teacher`` is a source, or can be one: whether its features of a RoI depend on that RoI alone."""
    return isinstance(teacher, TeacherSource) or answers_about_rois(teacher)
