"""The contracts of detectors: what a detector, a dense head and a RoI head owe to everything outside this folder.

Whoever adds a kind of detector subclasses these, adds its spec to ``headkd_ray.job.detector_spec`` and a line to
``registry.py``. It is then a student, a teacher and an assistant beside every other kind, and
``tests/detectors/test_contract.py`` checks it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from headkd_ray.detectors.backbone import STRIDES as BACKBONE_STRIDES
from headkd_ray.detectors.backbone import Backbone
from headkd_ray.detectors.fpn import FPN
from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.anchors import Anchors
from headkd_ray.detectors.ops.proposals import Detections, Found, Proposals, best_pairs, conclude, flatten_cells, propose
from headkd_ray.detectors.ops.rois import RoIs
from headkd_ray.job import BoxHeadSpec, DenseDetectorSpec, DenseHeadSpec, TwoStageDetectorSpec

if TYPE_CHECKING:
    from headkd_ray.detectors.roi_head import BoxHead, BoxOutputs

Losses = dict[str, Tensor]
"""Float32 scalars by name; their plain sum is what is minimised."""


class Detector(nn.Module, ABC):
    """A backbone, a pyramid and the heads that a subclass adds; the module tree is exactly what a checkpoint holds."""

    spec: DenseDetectorSpec | TwoStageDetectorSpec
    strides: ClassVar[tuple[int, ...]]
    """Pixels a cell of each pyramid level, finest first."""
    _mean: Tensor
    _std: Tensor

    def __init__(self, spec: DenseDetectorSpec | TwoStageDetectorSpec, num_classes: int) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        self._finest = BACKBONE_STRIDES.index(self.strides[0])
        self.backbone = Backbone(spec.backbone)
        self.neck = FPN(spec.neck, self.backbone.channels[self._finest :])
        self.register_buffer("_mean", torch.tensor(spec.pixels.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(spec.pixels.std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: Tensor, sizes: Tensor) -> Tensor:
        """``images`` (B, 3, H, W) uint8 RGB to float32 (pixel - mean) / std, zero outside each image's (h, w) in ``sizes``."""
        x = (images.float() - self._mean) / self._std
        h, w = sizes[:, 0, None, None], sizes[:, 1, None, None]
        rows = torch.arange(images.shape[2], device=images.device)[None, :, None]
        columns = torch.arange(images.shape[3], device=images.device)[None, None, :]
        return x.masked_fill_(~((rows < h) & (columns < w)).unsqueeze(1), 0.0)

    def features(self, x: Tensor) -> list[Tensor]:
        """Pyramid levels (B, channels, H, W), finest first, of normalised images ``x`` (B, 3, H, W)."""
        return self.neck(self.backbone(x)[self._finest :])

    @property
    @abstractmethod
    def detection_head(self) -> DenseHead | RoIHead:
        """The head that detects: distillation reads its features, and an assistant of this kind of detector is another one."""

    @abstractmethod
    def losses(self, features: list[Tensor], truth: GroundTruth, generator: torch.Generator | None = None) -> Losses:
        """Supervised losses, float32 scalars by name, on one pyramid.

        ``generator`` (on the tensors' device; None = torch's default) draws samples where the detector samples.
        """

    @abstractmethod
    def detect(self, x: Tensor, sizes: Tensor) -> Detections:
        """Detections of normalised images ``x`` (B, 3, H, W); call in eval mode. Carries no gradient."""

    def forward(self, images: Tensor, sizes: Tensor) -> Detections:
        """Detections of ``images`` (B, 3, H, W) uint8 RGB; ``sizes`` (B, 2) unpadded (h, w)."""
        return self.detect(self.normalise(images, sizes), sizes)


class DenseOutputs(Protocol):
    """What a dense head says about each pyramid level; a head's own NamedTuple has more. A anchors a cell, C classes."""

    @property
    def logits(self) -> list[Tensor]:
        """(B, A * C, H, W) a level, anchor-major."""

    @property
    def taps(self) -> list[list[Tensor]]:
        """What distillation reads; see :meth:`DenseHead.taps`."""


OutputsT = TypeVar("OutputsT", bound=DenseOutputs)


class DenseHead(nn.Module, ABC, Generic[OutputsT]):
    """A head that answers for every cell of every pyramid level, with ``num_classes`` sigmoid classes.

    It detects, and it proposes RoIs to a RoI head that helps it learn. A subclass sets ``anchors``, and names its layer of
    class logits ``cls_out`` (anchor-major), so that a checkpoint can be carried over to other classes.
    """

    spec: DenseHeadSpec
    anchors: Anchors
    """The reference boxes of the cells; a head of points has one square a cell."""

    def __init__(self, spec: DenseHeadSpec, in_channels: int, num_classes: int, strides: Sequence[int]) -> None:
        """``strides``: pixels a cell of each level of ``in_channels`` that :meth:`forward` takes."""
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        self.strides = tuple(strides)

    @property
    @abstractmethod
    def tap_channels(self) -> list[int]:
        """Width of each of :meth:`taps`."""

    @property
    def lead_channels(self) -> int:
        """Width of the tap that CKD reads, the first."""
        return self.tap_channels[0]

    @abstractmethod
    def taps(self, features: Sequence[Tensor]) -> list[list[Tensor]]:
        """The post-ReLU features that distillation reads, each a list of (B, tap_channels, H, W), a level of ``features`` each.

        The first is the output of the last classification conv.
        """

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> OutputsT:
        """The head's outputs on ``features``, (B, in_channels, H, W) a level."""

    @abstractmethod
    def losses(self, outputs: OutputsT, truth: GroundTruth) -> Losses:
        """Supervised losses by name (``loss_*``), float32 scalars, normalised as the detector's paper does."""

    @abstractmethod
    def box_maps(self, outputs: OutputsT) -> list[Tensor]:
        """(B, A * 4, H, W) a level, anchor-major: what :meth:`decode` turns into boxes."""

    @abstractmethod
    def decode(self, predicted: Tensor, reference: Tensor) -> Tensor:
        """Boxes (..., 4) in pixels from rows of :meth:`box_maps` (..., 4) float32 and their anchors (..., 4)."""

    @abstractmethod
    def nearest_cells(self, outputs: OutputsT, boxes: Tensor) -> Tensor:
        """(N, 4) int64 (level, y, x, anchor): the cell that would propose each of ``boxes`` (N, 4). Carries no gradient."""

    @torch.no_grad()
    def proposals(self, outputs: OutputsT, sizes: Tensor) -> Proposals:
        """RoIs for a RoI head, each with the cell that it came from: the head as an RPN whose score is that of the likeliest
        class. They carry no gradient; ``sizes`` (B, 2) unpadded (h, w)."""
        best = [m.unflatten(1, (-1, self.num_classes)).amax(2).float().sigmoid() for m in outputs.logits]
        return propose(best, self.box_maps(outputs), self.anchors, sizes, self.spec.proposals, self.decode)

    @torch.no_grad()
    def detect(self, outputs: OutputsT, sizes: Tensor) -> Detections:
        """Detections at test settings, scored by class probability; ``sizes`` (B, 2) unpadded (h, w)."""
        grid, rules = self.anchors.grid(outputs.logits), self.spec.postprocess
        logits, maps = flatten_cells(outputs.logits, self.num_classes), flatten_cells(self.box_maps(outputs), 4)
        found, offset = [], 0
        for level_logits, level_boxes, count in zip(logits, maps, grid.counts, strict=True):
            anchor, score, label = best_pairs(level_logits, rules.pre_nms)
            boxes = self.boxes_at(level_boxes, anchor, grid.boxes[offset : offset + count])
            found.append(Found(boxes, score, score, label))
            offset += count
        return conclude(found, sizes, rules, self.num_classes)

    def boxes_at(self, predicted: Tensor, anchor: Tensor, reference: Tensor) -> Tensor:
        """(B, K, 4) boxes of the anchors at ``anchor`` (B, K) of one level, from its rows of :meth:`box_maps`, ``predicted``
        (B, N, 4), and its anchors ``reference`` (N, 4)."""
        rows = predicted.gather(1, anchor.unsqueeze(-1).expand(-1, -1, 4)).float()
        return self.decode(rows, reference[anchor])


class StageOutput(NamedTuple):
    """What one stage of a RoI head says in a training step, and about which RoIs."""

    rois: RoIs
    outputs: BoxOutputs


class RoIHead(nn.Module, ABC):
    """A head that answers for RoIs, in one stage or in several that refine them one after the other."""

    spec: BoxHeadSpec
    stages: Sequence[BoxHead]
    """The box heads, first to last. Distillation reads the post-ReLU outputs of their fully connected layers."""

    def __init__(self, spec: BoxHeadSpec, in_channels: int, num_classes: int, strides: Sequence[int]) -> None:
        """``strides``: pixels a cell of each of the levels, of ``in_channels``, that RoIs are pooled from."""
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        self.strides = tuple(strides)

    @property
    def tap_channels(self) -> list[int]:
        """Width of each tap: the fully connected layers of the first stage, then of the next."""
        return [width for stage in self.stages for width in stage.fc_widths]

    @property
    def lead_channels(self) -> int:
        """Width of the tap that CKD reads, the last of the first stage."""
        return self.stages[0].fc_widths[-1]

    @abstractmethod
    def stage_outputs(
        self, features: Sequence[Tensor], rois: RoIs, truth: GroundTruth, generator: torch.Generator | None = None
    ) -> list[StageOutput]:
        """What each stage says in a training step: the first about ``rois``, any other about what the one before it made of
        them, matched with ``truth`` and sampled again by ``generator``. No gradient flows from stage to stage."""

    @abstractmethod
    def losses(self, outputs: Sequence[StageOutput]) -> Losses:
        """Supervised losses by name, float32 scalars, at the RoIs of ``outputs``."""

    @abstractmethod
    def detect(self, features: Sequence[Tensor], boxes: Tensor, image: Tensor, sizes: Tensor) -> Detections:
        """Detections at test settings from RoIs ``boxes`` (R, 4) of images ``image`` (R,); ``sizes`` (B, 2) unpadded (h, w)."""
