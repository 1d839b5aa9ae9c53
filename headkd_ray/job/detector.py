"""The architecture keys of a detector: shared by the job file, the checkpoint's meta and the model builders.

Defaults are the paper's R18 RetinaNet student and R50 Faster R-CNN teacher (official code,
``configs/_base_/models``). A detector's classes are not here: they come with the data.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


class Spec(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading.

    A section whose defaults differ by place (the RPN's anchors, the Faster R-CNN's pyramid, ...) is a subclass with its own
    defaults, so that a job that names one key of a section keeps that place's defaults for the rest. ``from_attributes`` lets
    Python code pass the base class there; its values are then taken as they are.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, from_attributes=True
    )


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Text = Annotated[str, Field(min_length=1)]


class BackboneSpec(Spec):
    """Any timm backbone, tapped at strides 4 to 32 (C2 to C5)."""

    name: Text = "resnet18"
    """timm model name, for example resnet18, resnet50, mobilenetv2_100, convnext_tiny. A tag chooses among timm's weights:
    resnet18.tv_in1k = torchvision's ImageNet weights (the paper's)."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra arguments of timm.create_model: widths and depths of micro models (for example stem_width, channels, layers).
    mobilenetv2_* takes stem_width, channels (7), layers (7) and head_width here."""
    weights: Text = "none"
    """Initial weights: none (timm's random init), timm (download through timm), or a path to a .safetensors or
    .pth state dict (timm's, torchvision's or mmdet's key names). A relative path starts at the command's current folder."""
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 1
    """Stages without gradient, counted from the input: 0 = none, 1 = stem and first stage (C2), 2 = also C3, ..., 4 = all.
    Needs initial weights."""
    norm_eval: bool = True
    """Keep every BatchNorm in eval mode while training (paper: true for ResNet, false for MobileNetV2). Needs initial
    weights: from random ones its statistics would stay 0 and 1."""
    leaky_slope: Annotated[float, Field(gt=0.0)] | None = None
    """Use LeakyReLU with this negative slope as the backbone's activation (paper's MobileNetV2: 0.1); null keeps timm's."""
    norm_eps: Annotated[float, Field(ge=0.0)] | None = None
    """Epsilon of every BatchNorm; null keeps timm's (1e-5)."""
    final_conv: bool = False
    """Take C5 after the classifier's last 1x1 conv (paper's MobileNetV2: 1280 channels) instead of before it."""


class PixelSpec(Spec):
    """Input normalisation, (pixel - mean) / std on RGB values 0..255; padding is zero after it."""

    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of R, G, B, in units of 0..255 (ImageNet)."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)
    """Standard deviation of R, G, B, in units of 0..255 (ImageNet)."""


class FPNSpec(Spec):
    """Feature pyramid network; the lowest level follows from the detector (P3 for RetinaNet, P2 for Faster R-CNN)."""

    channels: PositiveInt = 256
    """Channels of every pyramid level."""
    extra: Literal["conv_c5", "conv_p5", "pool"] = "conv_c5"
    """Levels above P5: conv_c5 = two stride-2 3x3 convs, the first on C5 (paper's RetinaNet); conv_p5 = the first on P5;
    pool = one level, P5 subsampled by 2 (Faster R-CNN, and only there)."""
    relu_before_p7: bool = False
    """ReLU between P6 and P7 (torchvision's RetinaNet: true; the paper's: false); without effect for pool."""
    norm: bool = False
    """BatchNorm instead of a bias in the lateral and output convs (torchvision's Faster R-CNN v2)."""


class PooledFPNSpec(FPNSpec):
    """Feature pyramid of Faster R-CNN, P2 to P6."""

    extra: Literal["conv_c5", "conv_p5", "pool"] = "pool"
    """Levels above P5; Faster R-CNN takes pool: one level, P5 subsampled by 2."""


class ResNet50Spec(BackboneSpec):
    """The teacher's backbone: any timm backbone, ResNet-50 unless named."""

    name: Text = "resnet50"
    """timm model name, for example resnet50, resnet18, convnext_tiny. A tag chooses among timm's weights:
    resnet50.tv_in1k = torchvision's ImageNet weights (the paper's)."""


class AnchorSpec(Spec):
    """Anchors of a dense head; per level the base size is base_scale x stride."""

    base_scale: PositiveFloat = 4.0
    """Anchor side in units of the level's stride, before octaves (RetinaNet 4, RPN 8)."""
    octave_scales: PositiveInt = 3
    """Anchor scales an octave: base_scale x 2^(i/octave_scales) (RetinaNet 3, RPN 1)."""
    ratios: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.5, 1.0, 2.0)
    """Aspect ratios, height / width."""
    rounding: bool = False
    """Round anchors to whole pixels and derive strides from the feature size, as torchvision does (paper: false)."""


class RPNAnchorSpec(AnchorSpec):
    """Anchors of the RPN: one scale per level."""

    base_scale: PositiveFloat = 8.0
    """Anchor side in units of the level's stride, before octaves."""
    octave_scales: PositiveInt = 1
    """Anchor scales an octave: base_scale x 2^(i/octave_scales)."""


class ProposalSpec(Spec):
    """How a dense head proposes RoIs."""

    pre_nms: PositiveInt = 2000
    """Candidates kept per level before NMS, by score."""
    post_nms: PositiveInt = 1000
    """Proposals kept per image after NMS."""
    nms_iou: Fraction = 0.7
    """IoU above which NMS, within a level, drops the lower-scored proposal."""
    min_size: NonNegativeFloat | None = 0.0
    """Width and height that a proposal must exceed, in pixels of the network input; null = no limit."""


class RPNTestProposalSpec(ProposalSpec):
    """How the RPN proposes RoIs at test time."""

    pre_nms: PositiveInt = 1000
    """Candidates kept per level before NMS, by score."""


class PostprocessSpec(Spec):
    """From raw predictions to detections, at test time."""

    pre_nms: PositiveInt = 1000
    """Candidates kept per level before NMS (dense heads)."""
    score: Fraction = 0.05
    """Score a detection must exceed."""
    nms_iou: Fraction = 0.5
    """IoU above which NMS, within a class, drops the lower-scored detection."""
    max_detections: PositiveInt = 100
    """Detections kept per image."""
    min_size: NonNegativeFloat | None = None
    """Width and height that a detection must exceed, in pixels of the network input; null = no limit (paper)."""


class RoIPostprocessSpec(PostprocessSpec):
    """From a RoI head's raw predictions to detections, at test time."""

    min_size: NonNegativeFloat | None = None
    """Width and height that a detection must exceed, in pixels of the network input; null = no limit."""


class SamplerSpec(Spec):
    """Random sampling of positives and negatives in one image."""

    size: PositiveInt = 512
    """Samples per image."""
    positive_fraction: Fraction = 0.25
    """Largest share of positives among them."""


class RPNSamplerSpec(SamplerSpec):
    """Random sampling of the RPN's anchors in one image."""

    size: PositiveInt = 256
    """Samples per image."""
    positive_fraction: Fraction = 0.5
    """Largest share of positives among them."""


class RetinaHeadSpec(Spec):
    """RetinaNet's dense head."""

    convs: PositiveInt = 4
    """Depth of each tower (classification, box): 3x3 conv + ReLU."""
    channels: PositiveInt = 256
    """Width of the towers."""
    tower_std: PositiveFloat | None = 0.01
    """Initial weights of the towers: N(0, tower_std), the paper's choice for 256 channels; null = He initialisation, for narrow
    towers, in which 0.01 lets the signal vanish."""
    anchors: AnchorSpec = AnchorSpec()
    """Anchors."""
    positive_iou: Fraction = 0.5
    """IoU with a ground-truth box from which an anchor is positive."""
    negative_iou: Fraction = 0.4
    """IoU below which an anchor is negative; between the two it is ignored."""
    focal_alpha: Fraction = 0.25
    """Focal loss alpha."""
    focal_gamma: Annotated[float, Field(ge=0.0)] = 2.0
    """Focal loss gamma."""
    prior: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Initial foreground probability (bias of the classification layer)."""
    clamp_shrink: bool = True
    """Limit how much a box may shrink from its anchor to 16/1000, as growth always is to 1000/16 (torchvision: false)."""
    proposals: ProposalSpec = ProposalSpec()
    """Proposals that the head gives to an assistant while training (paper section 2: 2000 / 1000 / 0.7)."""
    postprocess: PostprocessSpec = PostprocessSpec()
    """Detections at test time."""


class RPNSpec(Spec):
    """Region proposal network of Faster R-CNN."""

    convs: PositiveInt = 1
    """3x3 conv + ReLU layers before the two outputs (torchvision v2: 2)."""
    tower_std: PositiveFloat | None = 0.01
    """Initial weights of those layers: N(0, tower_std), the paper's choice for 256 channels; null = He initialisation, for
    narrow ones, in which 0.01 lets the signal vanish."""
    anchors: RPNAnchorSpec = RPNAnchorSpec()
    """Anchors."""
    positive_iou: Fraction = 0.7
    """IoU from which an anchor is positive."""
    negative_iou: Fraction = 0.3
    """IoU below which an anchor is negative; also the least IoU of a low-quality match."""
    sampler: RPNSamplerSpec = RPNSamplerSpec()
    """Anchors that enter the loss."""
    clamp_shrink: bool = True
    """Limit how much a box may shrink from its anchor to 16/1000, as growth always is to 1000/16 (torchvision: false)."""
    train_proposals: ProposalSpec = ProposalSpec()
    """Proposals while training."""
    test_proposals: RPNTestProposalSpec = RPNTestProposalSpec()
    """Proposals at test time."""


class RoIHeadSpec(Spec):
    """Box head on RoI features; also the architecture of HEAD's assistant."""

    convs: NonNegativeInt = 0
    """3x3 conv layers before the fully connected ones (torchvision v2: 4)."""
    conv_channels: PositiveInt = 256
    """Width of those convs."""
    conv_norm: bool = False
    """BatchNorm after each of those convs (torchvision v2)."""
    fcs: PositiveInt = 2
    """Fully connected layers with ReLU; each one's output is a tap for AKD."""
    fc_channels: PositiveInt = 1024
    """Width of the fully connected layers."""
    pool: PositiveInt = 7
    """RoIAlign output side, in bins."""
    sampling_ratio: NonNegativeInt = 0
    """RoIAlign samples per bin and axis; 0 = adaptive (paper); torchvision's models use 2."""
    aligned: bool = True
    """RoIAlign with the half-pixel shift (paper: true; torchvision's models: false)."""
    finest_scale: PositiveFloat = 56.0
    """RoI to level: clamp(floor(log2(sqrt(area) / finest_scale + 1e-6)), 0, 3), pixels of the network input.
    torchvision's 224-at-level-4 map on P2 to P5 equals 56."""
    class_agnostic: bool = False
    """One box for all classes instead of one per class."""
    clamp_shrink: bool = True
    """Limit how much a box may shrink from its RoI to 16/1000, as growth always is to 1000/16 (torchvision: false)."""
    positive_iou: Fraction = 0.5
    """IoU from which a RoI is positive; below it is background."""
    sampler: SamplerSpec = SamplerSpec()
    """RoIs that enter the loss; ground-truth boxes are added in front."""
    postprocess: RoIPostprocessSpec = RoIPostprocessSpec()
    """Detections at test time."""


class RetinaNetSpec(Spec):
    """RetinaNet: a dense detector on P3 to P7."""

    kind: Literal["retinanet"] = "retinanet"
    """The detector's kind: retinanet (one dense head) or faster_rcnn (RPN and RoI head)."""
    backbone: BackboneSpec = BackboneSpec()
    """Backbone."""
    neck: FPNSpec = FPNSpec()
    """Feature pyramid, P3 to P7."""
    head: RetinaHeadSpec = RetinaHeadSpec()
    """Dense head."""
    pixels: PixelSpec = PixelSpec()
    """Input normalisation."""


class FasterRCNNSpec(Spec):
    """Faster R-CNN: RPN on P2 to P6, RoI head on P2 to P5."""

    kind: Literal["faster_rcnn"] = "faster_rcnn"
    """The detector's kind: faster_rcnn (RPN and RoI head) or retinanet (one dense head)."""
    backbone: ResNet50Spec = ResNet50Spec()
    """Backbone."""
    neck: PooledFPNSpec = PooledFPNSpec()
    """Feature pyramid, P2 to P6."""
    rpn: RPNSpec = RPNSpec()
    """Region proposal network."""
    roi: RoIHeadSpec = RoIHeadSpec()
    """RoI head."""
    pixels: PixelSpec = PixelSpec()
    """Input normalisation."""


DetectorSpec = Annotated[RetinaNetSpec | FasterRCNNSpec, Field(discriminator="kind")]
