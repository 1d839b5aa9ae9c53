"""Define the architecture keys of two-stage detectors.

Defaults are the paper's R50 Faster R-CNN teacher and the Cascade R-CNN of its research branch (official code,
``configs/_base_/models``).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from headkd_ray.job.module_specs import (
    KIND,
    BackboneSpec,
    FPNSpec,
    PixelSpec,
    PooledFPNSpec,
    ProposalSpec,
    PyramidDetectorSpec,
    ResNet50Spec,
    RoIPostprocessSpec,
    RPNAnchorSpec,
    RPNSamplerSpec,
    RPNTestProposalSpec,
    SamplerSpec,
    Spec,
    Stds,
)
from headkd_ray.job.numbers import Bins, Boxes, Channels, Factor, Fraction, Layers, LayersOrNone, Length, Samples, Scale, Weight


class RPNSpec(Spec):
    """The region proposal network of Faster R-CNN and Cascade R-CNN."""

    convs: Layers = 1
    """3x3 conv + ReLU layers before the two outputs (torchvision v2: 2)."""
    tower_std: Factor | None = 0.01
    """Initial weights of those layers: N(0, tower_std), the paper's choice for 256 channels; null = He initialisation, for
    narrow ones, where 0.01 lets the signal vanish."""
    anchors: RPNAnchorSpec = RPNAnchorSpec()
    """The anchors."""
    positive_iou: Fraction = 0.7
    """IoU from which an anchor is positive."""
    negative_iou: Fraction = 0.3
    """IoU below which an anchor is negative; also the smallest IoU of a low-quality match."""
    sampler: RPNSamplerSpec = RPNSamplerSpec()
    """Sampling of the anchors that enter the loss."""
    box_beta: Length = 0.0
    """Box loss: smooth L1, quadratic where a delta is off by less than this (in units of deltas); 0 = L1."""
    clamp_shrink: bool = True
    """Limit how much a box may shrink from its anchor to 16/1000, as growth always is to 1000/16 (torchvision: false)."""
    train_proposals: ProposalSpec = ProposalSpec()
    """Proposals in training."""
    test_proposals: RPNTestProposalSpec = RPNTestProposalSpec()
    """Proposals at test time."""


class BoxHeadSpec(Spec):
    """The keys that every box head on RoI features has."""

    convs: LayersOrNone = 0
    """Number of 3x3 conv layers before the fully connected ones (torchvision v2: 4)."""
    conv_channels: Channels = 256
    """Width of those convs."""
    conv_norm: bool = False
    """Apply BatchNorm after each of those convs (torchvision v2)."""
    fcs: Layers = 2
    """Number of fully connected layers with ReLU; AKD compares the output of each."""
    fc_channels: Channels = 1024
    """Width of the fully connected layers."""
    pool: Bins = 7
    """Side of RoIAlign's output, in bins."""
    sampling_ratio: Samples = 0
    """RoIAlign samples per bin and axis; 0 = adaptive (paper); torchvision's models use 2."""
    aligned: bool = True
    """Use RoIAlign with the half-pixel shift (paper: true; torchvision's models: false)."""
    finest_scale: Scale = 56.0
    """Assignment of RoIs to levels: clamp(floor(log2(sqrt(area) / finest_scale + 1e-6)), 0, 3), in pixels of the network input.
    torchvision's map of 224 to level 4 on P2 to P5 equals 56."""
    class_agnostic: bool = False
    """Predict one box for all classes instead of one per class."""
    clamp_shrink: bool = True
    """Limit how much a box may shrink from its RoI to 16/1000, as growth always is to 1000/16 (torchvision: false)."""
    box_beta: Length = 0.0
    """Box loss: smooth L1, quadratic where a delta is off by less than this (in units of deltas after stds); 0 = L1."""
    sampler: SamplerSpec = SamplerSpec()
    """Sampling of the RoIs that enter the loss; ground-truth boxes are added in front."""
    postprocess: RoIPostprocessSpec = RoIPostprocessSpec()
    """Post-processing of detections at test time."""


class RoIHeadSpec(BoxHeadSpec):
    """A box head on RoI features; also the architecture of HEAD's assistant."""

    positive_iou: Fraction = 0.5
    """IoU from which a RoI is positive; below it is background."""
    stds: Stds = (0.1, 0.1, 0.2, 0.2)
    """Scale of the box deltas dx, dy, dw, dh: the head predicts a shift in units of RoI sides, or the log of a ratio of sides,
    divided by this."""


class TwoStageDetectorSpec(PyramidDetectorSpec):
    """The keys that every two-stage detector has; each kind overrides the defaults."""

    backbone: BackboneSpec
    neck: FPNSpec
    rpn: RPNSpec
    roi: BoxHeadSpec
    pixels: PixelSpec = PixelSpec()
    """Input normalisation."""


class FasterRCNNSpec(TwoStageDetectorSpec):
    """Faster R-CNN: RPN on P2 to P6, RoI head on P2 to P5."""

    kind: Annotated[Literal["faster_rcnn"], KIND] = "faster_rcnn"
    backbone: ResNet50Spec = ResNet50Spec()
    """The backbone."""
    neck: PooledFPNSpec = PooledFPNSpec()
    """The feature pyramid, P2 to P6."""
    rpn: RPNSpec = RPNSpec()
    """The region proposal network."""
    roi: RoIHeadSpec = RoIHeadSpec()
    """The RoI head."""


class CascadeHeadSpec(BoxHeadSpec):
    """A cascade of box heads of the same shape, each on the boxes that the previous one refined. What differs between stages is
    a list with one value per stage; sampling and loss are shared, and only the last stage's boxes become detections."""

    class_agnostic: bool = True
    """Predict one box for all classes instead of one per class."""
    box_beta: Length = 1.0
    """Box loss: smooth L1, quadratic where a delta is off by less than this (in units of deltas after stds); 0 = L1."""
    positive_ious: Annotated[tuple[Fraction, ...], Field(min_length=1, max_length=10)] = (0.5, 0.6, 0.7)
    """For each stage, the IoU from which a RoI is positive; below it is background. The length sets the number of stages."""
    stds: tuple[Stds, ...] = (
        (0.1, 0.1, 0.2, 0.2),
        (0.05, 0.05, 0.1, 0.1),
        (0.033, 0.033, 0.067, 0.067),
    )
    """For each stage, the scale of its box deltas dx, dy, dw, dh; it shrinks as the boxes get better."""
    weights: tuple[Weight, ...] = (1.0, 0.5, 0.25)
    """For each stage, the weight of its class and box loss."""
    average: Literal["logits", "scores"] = "logits"
    """How a detection's score is averaged over the stages: logits = the softmax of the mean logits (mmdet and its weights);
    scores = the mean of the softmax scores (Detectron2)."""

    @property
    def stages(self) -> tuple[RoIHeadSpec, ...]:
        """The spec of each stage's head."""
        shared = {name: getattr(self, name) for name in BoxHeadSpec.model_fields}
        places = zip(self.positive_ious, self.stds, strict=True)
        return tuple(RoIHeadSpec(**shared, positive_iou=iou, stds=stds) for iou, stds in places)


class CascadeProposalSpec(ProposalSpec):
    """How the RPN of Cascade R-CNN proposes RoIs while training."""

    post_nms: Boxes = 2000
    """Proposals kept per image after NMS."""


class CascadeRPNSpec(RPNSpec):
    """The region proposal network of Cascade R-CNN."""

    box_beta: Length = 1 / 9
    """Box loss: smooth L1, quadratic where a delta is off by less than this (in units of deltas); 0 = L1."""
    train_proposals: CascadeProposalSpec = CascadeProposalSpec()
    """Proposals in training."""


class CascadeRCNNSpec(TwoStageDetectorSpec):
    """Cascade R-CNN: RPN on P2 to P6, a cascade of RoI heads on P2 to P5."""

    kind: Annotated[Literal["cascade_rcnn"], KIND] = "cascade_rcnn"
    backbone: ResNet50Spec = ResNet50Spec()
    """The backbone."""
    neck: PooledFPNSpec = PooledFPNSpec()
    """The feature pyramid, P2 to P6."""
    rpn: CascadeRPNSpec = CascadeRPNSpec()
    """The region proposal network."""
    roi: CascadeHeadSpec = CascadeHeadSpec()
    """The RoI heads."""
