"""Abstract base classes: what a detector, a dense head and a RoI head must provide to everything outside this folder.

A ``Detector`` can be trained, evaluated and stored. A ``PyramidDetector`` is one with heads on a feature pyramid, which methods
with assistants and teachers need. To add a kind, subclass these, add its spec to ``headkd_ray.job.detector_spec`` and a line to
``registry.py``; ``tests/detectors/test_contract.py`` then checks it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import Self

from headkd_ray.detectors.backbone import STRIDES as BACKBONE_STRIDES
from headkd_ray.detectors.backbone import Backbone
from headkd_ray.detectors.backbone_trial import Size, backbone_problems
from headkd_ray.detectors.fit import check_fit, fit
from headkd_ray.detectors.fpn import FPN
from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.anchors import Anchors
from headkd_ray.detectors.ops.proposals import Detections, Found, Proposals, best_pairs, conclude, flatten_cells, propose
from headkd_ray.detectors.ops.rois import RoIs
from headkd_ray.detectors.safe_load import read_file
from headkd_ray.job import BoxHeadSpec, DenseHeadSpec, PyramidDetectorSpec, WholeDetectorSpec

if TYPE_CHECKING:
    from headkd_ray.detectors.roi_head import BoxHead, BoxOutputs

Losses = dict[str, Tensor]
"""Losses as float32 scalars by name; training minimises their plain sum."""


WEIGHTS = "model.safetensors"
"""Name of the file with a detector's tensors in the folder of a checkpoint."""


class Rules(NamedTuple):
    """What every detection has passed."""

    score: float
    """Score that it exceeds."""
    nms_iou: float
    """IoU above which NMS within a class has dropped the lower-scored detection; 1 = there is no NMS."""
    max_detections: int
    """Largest number of detections of an image."""


class Detector(nn.Module, ABC):
    """A network that finds boxes of ``num_classes`` classes; a checkpoint holds exactly its tensors."""

    spec: WholeDetectorSpec
    _mean: Tensor
    _std: Tensor

    def __init__(self, spec: WholeDetectorSpec, num_classes: int) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        self.register_buffer("_mean", torch.tensor(spec.pixels.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(spec.pixels.std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Return (pixel - mean) / std of ``images`` (B, 3, H, W) uint8 RGB, zero outside each image's (h, w) in ``sizes``.

        The result is float32.
        """
        x = (images.float() - self._mean) / self._std
        h, w = sizes[:, 0, None, None], sizes[:, 1, None, None]
        rows = torch.arange(images.shape[2], device=images.device)[None, :, None]
        columns = torch.arange(images.shape[3], device=images.device)[None, None, :]
        return x.masked_fill_(~((rows < h) & (columns < w)).unsqueeze(1), 0.0)

    @abstractmethod
    def supervised(self, x: Tensor, truth: GroundTruth, generator: torch.Generator | None = None) -> Losses:
        """Compute the supervised losses, float32 scalars by name, of images ``x`` as :meth:`normalise` returns them.

        ``generator`` (on the tensors' device; None = torch's default) is used where the detector draws samples.
        """

    @abstractmethod
    def detect(self, x: Tensor, sizes: Tensor) -> Detections:
        """Detect objects in images ``x`` as :meth:`normalise` returns them, without gradients. Call it in eval mode.

        ``sizes`` (B, 2) are the (h, w) of the views without padding, in whose pixels the boxes are.
        """

    def forward(self, images: Tensor, sizes: Tensor) -> Detections:
        """Detect objects in ``images`` (B, 3, H, W) uint8 RGB; ``sizes`` (B, 2) are their unpadded (h, w)."""
        return self.detect(self.normalise(images, sizes), sizes)

    @property
    @abstractmethod
    def rules(self) -> Rules:
        """The rules by which it keeps detections."""

    @abstractmethod
    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the backbone, which may be trained with a learning rate of their own."""

    @abstractmethod
    def class_rows(self) -> Mapping[str, Tensor]:
        """Return which class each row of a tensor stands for, by the tensor's name in ``state_dict()``: (rows,) int64.

        It lists the tensors with a row, or several, for each class. ``num_classes`` stands for background.
        """

    @abstractmethod
    def size_problems(self, sizes: Sequence[Size], changeable: bool = True) -> list[str]:
        """List what keeps the network from taking views of ``sizes``, padding included, each with the key to mend.

        ``changeable``: whether the detector's own keys can be changed; those of a trained one cannot.
        """

    def save(self, folder: Path, classes: Sequence[str], meta: Mapping[str, Any]) -> None:
        """Write the tensors into the local ``folder`` as ``WEIGHTS``.

        ``classes`` and ``meta`` are those of ``model.json``, for what another library keeps beside the tensors.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    @abstractmethod
    def load(cls, spec: Any, num_classes: int, folder: Path) -> Self:
        """Build the detector from a ``spec`` of its kind, with the tensors that :meth:`save` wrote into ``folder``.

        Raises CheckpointError listing every tensor that does not fit, JobError if it cannot be built. Nothing of the spec's
        size is allocated before the tensors fit.
        """


class PyramidDetector(Detector, ABC):
    """A backbone, a feature pyramid and the heads that a subclass adds."""

    spec: PyramidDetectorSpec
    strides: ClassVar[tuple[int, ...]]
    """Stride of each pyramid level in pixels, finest first."""

    def __init__(self, spec: PyramidDetectorSpec, num_classes: int) -> None:
        super().__init__(spec, num_classes)
        self._finest = BACKBONE_STRIDES.index(self.strides[0])
        self.backbone = Backbone(spec.backbone)
        self.neck = FPN(spec.neck, self.backbone.channels[self._finest :])

    def features(self, x: Tensor) -> list[Tensor]:
        """Compute the pyramid levels (B, channels, H, W), finest first, of normalised images ``x`` (B, 3, H, W)."""
        return self.neck(self.backbone(x)[self._finest :])

    @property
    @abstractmethod
    def detection_head(self) -> DenseHead | RoIHead:
        """The head that detects. Distillation reads its features; an assistant of this kind is another head of its class."""

    @abstractmethod
    def losses(self, features: list[Tensor], truth: GroundTruth, generator: torch.Generator | None = None) -> Losses:
        """Compute the losses of :meth:`supervised` on one pyramid."""

    def supervised(self, x: Tensor, truth: GroundTruth, generator: torch.Generator | None = None) -> Losses:
        return self.losses(self.features(x), truth, generator)

    def backbone_parameters(self) -> list[nn.Parameter]:
        return list(self.backbone.parameters())

    def size_problems(self, sizes: Sequence[Size], changeable: bool = True) -> list[str]:
        return backbone_problems(self.spec.backbone, sizes, changeable)

    @classmethod
    def load(cls, spec: Any, num_classes: int, folder: Path) -> Self:
        tensors = read_file(folder / WEIGHTS)
        # The backbone's initial weights are part of these tensors: nothing to load or download again.
        spec = spec.replace({"backbone.weights": "none", **cls.newer_keys(spec, tensors)})
        with torch.device("meta"):
            check_fit(cls(spec, num_classes), tensors, str(folder))
        detector = cls(spec, num_classes)
        fit(detector, tensors, str(folder))
        return detector

    @staticmethod
    def newer_keys(spec: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the keys that ``spec`` lacks because it is older than they are, with the values that its ``tensors`` tell."""
        return {}


class DenseOutputs(Protocol):
    """The outputs that all dense heads share; a head's own NamedTuple has more. A anchors per cell, C classes."""

    @property
    def logits(self) -> list[Tensor]:
        """Class logits (B, A * C, H, W) of each level, anchor-major."""

    @property
    def taps(self) -> list[list[Tensor]]:
        """The features that distillation reads; see :meth:`DenseHead.taps`."""


OutputsT = TypeVar("OutputsT", bound=DenseOutputs)


class DenseHead(nn.Module, ABC, Generic[OutputsT]):
    """A head that predicts at every cell of every pyramid level, with ``num_classes`` sigmoid classes.

    It detects, and it proposes RoIs to an assistant that is a RoI head. A subclass sets ``anchors`` and the two towers, and
    names its layer of class logits ``cls_out`` (anchor-major), so that a checkpoint can be adapted to other classes.
    """

    spec: DenseHeadSpec
    cls_tower: nn.Sequential
    """The convs in front of the class logits; see ``towers.py``."""
    box_tower: nn.Sequential
    """The convs in front of the boxes."""
    anchors: Anchors
    """The reference boxes of the cells; an anchor-free head has one square per cell."""
    class_weights: Tensor | None
    """See ``weigh_classes``."""

    def __init__(self, spec: DenseHeadSpec, in_channels: int, num_classes: int, strides: Sequence[int]) -> None:
        """``strides`` are the strides in pixels of the levels, of ``in_channels`` each, that :meth:`forward` takes."""
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.register_buffer("class_weights", None, persistent=False)

    @property
    @abstractmethod
    def tap_channels(self) -> list[int]:
        """Number of channels of each of :meth:`taps`."""

    @property
    def lead_channels(self) -> int:
        """Number of channels of the tap that CKD reads, the first."""
        return self.tap_channels[0]

    @abstractmethod
    def taps(self, features: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the post-ReLU features that distillation reads; the first is the output of the last classification conv.

        Each is a list with one map (B, tap_channels, H, W) per level of ``features``.
        """

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> OutputsT:
        """Run the head on ``features``, one map (B, in_channels, H, W) per level."""

    @abstractmethod
    def losses(self, outputs: OutputsT, truth: GroundTruth) -> Losses:
        """Compute the supervised losses by name (``loss_*``), float32 scalars, normalised as in the detector's paper."""

    @abstractmethod
    def box_maps(self, outputs: OutputsT) -> list[Tensor]:
        """Return the box predictions for :meth:`decode`: a map (B, A * 4, H, W) per level, anchor-major."""

    @abstractmethod
    def decode(self, predicted: Tensor, reference: Tensor) -> Tensor:
        """Turn rows of :meth:`box_maps` (..., 4) float32 and their anchors (..., 4) into boxes (..., 4) in pixels."""

    @abstractmethod
    def nearest_cells(self, outputs: OutputsT, boxes: Tensor) -> Tensor:
        """Find the cell that would propose each of ``boxes`` (N, 4): (N, 4) int64 (level, y, x, anchor), without gradients."""

    @torch.no_grad()
    def proposals(self, outputs: OutputsT, sizes: Tensor) -> Proposals:
        """Propose RoIs for a RoI head, each with the cell that it came from; they carry no gradient.

        The head acts as an RPN whose score is that of the most likely class. ``sizes`` (B, 2) are unpadded (h, w).
        """
        best = [m.unflatten(1, (-1, self.num_classes)).amax(2).float().sigmoid() for m in outputs.logits]
        return propose(best, self.box_maps(outputs), self.anchors, sizes, self.spec.proposals, self.decode)

    @torch.no_grad()
    def detect(self, outputs: OutputsT, sizes: Tensor) -> Detections:
        """Detect at test settings; ``sizes`` (B, 2) are unpadded (h, w)."""
        return conclude(self.candidates(outputs), sizes, self.spec.postprocess, self.num_classes)

    @torch.no_grad()
    def candidates(self, outputs: OutputsT) -> list[Found]:
        """Return the best ``pre_nms`` pairs of anchor and class of each level, scored by class probability."""
        grid, rules = self.anchors.grid(outputs.logits), self.spec.postprocess
        logits, maps = flatten_cells(outputs.logits, self.num_classes), flatten_cells(self.box_maps(outputs), 4)
        found, offset = [], 0
        for level_logits, level_boxes, count in zip(logits, maps, grid.counts, strict=True):
            anchor, score, label = best_pairs(level_logits, rules.pre_nms)
            boxes = self.boxes_at(level_boxes, anchor, grid.boxes[offset : offset + count])
            found.append(Found(boxes, score, score, label))
            offset += count
        return found

    def boxes_at(self, predicted: Tensor, anchor: Tensor, reference: Tensor) -> Tensor:
        """Decode the boxes (B, K, 4) of the anchors at indices ``anchor`` (B, K) of one level.

        ``predicted`` (B, N, 4) are the level's rows of :meth:`box_maps`, ``reference`` (N, 4) its anchors.
        """
        rows = predicted.gather(1, anchor.unsqueeze(-1).expand(-1, -1, 4)).float()
        return self.decode(rows, reference[anchor])


class StageOutput(NamedTuple):
    """The outputs of one stage of a RoI head in a training step, and the RoIs that they belong to."""

    rois: RoIs
    outputs: BoxOutputs


class RoIHead(nn.Module, ABC):
    """A head that predicts for RoIs, in one stage or in several that refine them one after the other."""

    spec: BoxHeadSpec
    stages: Sequence[BoxHead]
    """The box heads, first to last. Distillation reads the post-ReLU outputs of their fully connected layers."""
    class_weights: Tensor | None
    """See ``weigh_classes``."""

    def __init__(self, spec: BoxHeadSpec, in_channels: int, num_classes: int, strides: Sequence[int]) -> None:
        """``strides`` are the strides in pixels of the levels, of ``in_channels`` each, from which RoIs are pooled."""
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.register_buffer("class_weights", None, persistent=False)

    @property
    def tap_channels(self) -> list[int]:
        """Width of each tap: the fully connected layers of the first stage, then those of the next."""
        return [width for stage in self.stages for width in stage.fc_widths]

    @property
    def lead_channels(self) -> int:
        """Width of the tap that CKD reads, the last of the first stage."""
        return self.stages[0].fc_widths[-1]

    @abstractmethod
    def stage_outputs(
        self, features: Sequence[Tensor], rois: RoIs, truth: GroundTruth, generator: torch.Generator | None = None
    ) -> list[StageOutput]:
        """Run all stages of a training step: the first on ``rois``, each later one on those that the stage before it refined.

        Refined RoIs are matched with ``truth`` and sampled again with ``generator``. No gradient flows from stage to stage.
        """

    @abstractmethod
    def losses(self, outputs: Sequence[StageOutput]) -> Losses:
        """Compute the supervised losses by name, float32 scalars, at the RoIs of ``outputs``."""

    @abstractmethod
    def final(self, features: Sequence[Tensor], boxes: Tensor, image: Tensor, sizes: Tensor) -> tuple[BoxOutputs, Tensor]:
        """Run all stages at test settings on RoIs ``boxes`` (R, 4) of images ``image`` (R,).

        ``sizes`` (B, 2) are unpadded (h, w). Returns the outputs that detect, and the RoIs (R, 4) that they belong to.
        """

    @torch.no_grad()
    def detect(self, features: Sequence[Tensor], boxes: Tensor, image: Tensor, sizes: Tensor) -> Detections:
        """Detect at test settings; the arguments are those of :meth:`final`."""
        outputs, rois = self.final(features, boxes, image, sizes)
        return self.stages[-1].conclude(outputs, rois, image, sizes)


def weigh_classes(module: nn.Module, weights: Sequence[float]) -> None:
    """Let the classification losses of all heads in ``module`` weigh their classes by ``weights`` (C,).

    What an anchor, a point or a RoI costs is multiplied by the weight of the class of its object; background has 1. The
    divisors of the losses stay numbers of anchors, points or RoIs.
    """
    for head in module.modules():
        if isinstance(head, DenseHead | RoIHead):
            head.class_weights = torch.tensor([*weights, 1.0])
