"""The architecture keys of a detector: shared by the job file, the checkpoint's meta and the model builders.

Defaults are the paper's R18 RetinaNet student and R50 Faster R-CNN teacher (official code, ``configs/_base_/models``), and
the FCOS of the paper's TF-HEAD. A detector's classes are not here: they come with the data.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from headkd_ray.job.parts import (
    AnchorSpec,
    BackboneSpec,
    FCOSFPNSpec,
    FPNSpec,
    Fraction,
    PixelSpec,
    PooledFPNSpec,
    PostprocessSpec,
    ProposalSpec,
    ResNet50Spec,
    RoIPostprocessSpec,
    RPNAnchorSpec,
    RPNSamplerSpec,
    RPNTestProposalSpec,
    SamplerSpec,
    Spec,
)
from headkd_ray.job.reppoints import RepPointsSpec


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


class FCOSHeadSpec(Spec):
    """FCOS's dense head."""

    convs: PositiveInt = 4
    """Depth of each tower (classification, box): 3x3 conv, norm, ReLU."""
    channels: PositiveInt = 256
    """Width of the towers."""
    norm_groups: PositiveInt | None = 32
    """Groups of the GroupNorm after each tower conv; null = no norm."""
    tower_std: PositiveFloat | None = 0.01
    """Initial weights of the towers: N(0, tower_std), the paper's choice for 256 channels; null = He initialisation."""
    centerness_on_reg: bool = True
    """Centerness on the box tower; false = on the classification tower."""
    norm_on_bbox: bool = True
    """Boxes by ReLU, as distances in units of the level's stride; false = by exp, as distances in pixels."""
    box_loss: Literal["giou", "iou"] = "giou"
    """Box loss: giou = 1 - generalised IoU; iou = -log IoU (the research branch's FCOS students)."""
    points: Literal["centre", "corner"] = "centre"
    """Where a cell's point lies: centre = (x + 1/2, y + 1/2) x stride (paper); corner = (x, y) x stride with strides derived
    from the feature size, as torchvision does."""
    center_radius: PositiveFloat | None = 1.5
    """A point is positive only within this many strides of its box's centre, along both axes; null = anywhere in the box."""
    regress_ranges: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (64.0, 128.0, 256.0, 512.0)
    """Largest distance from a point to a side of its box on P3, P4, P5 and P6, in pixels of the network input, and the
    smallest on the next level; P7 takes all above."""
    focal_alpha: Fraction = 0.25
    """Focal loss alpha."""
    focal_gamma: Annotated[float, Field(ge=0.0)] = 2.0
    """Focal loss gamma."""
    prior: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Initial foreground probability (bias of the classification layer)."""
    score: Literal["product", "sqrt"] = "product"
    """Score of a detection: product = class probability x centerness, with the class probability alone deciding which
    candidates get that far (paper); sqrt = square root of that product throughout (torchvision)."""
    proposals: ProposalSpec = ProposalSpec()
    """Proposals that the head gives to an assistant while training, by class probability alone."""
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
    """The detector's kind: retinanet (one dense head), fcos (one without anchors), reppoints (one of point sets) or
    faster_rcnn (RPN and RoI head)."""
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
    """The detector's kind: faster_rcnn (RPN and RoI head), retinanet (one dense head), fcos (one without anchors) or
    reppoints (one of point sets)."""
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


class FCOSSpec(Spec):
    """FCOS: a dense detector without anchors on P3 to P7."""

    kind: Literal["fcos"] = "fcos"
    """The detector's kind: fcos (one dense head without anchors), retinanet (one with), reppoints (one of point sets) or
    faster_rcnn (RPN and RoI head)."""
    backbone: BackboneSpec = BackboneSpec()
    """Backbone."""
    neck: FCOSFPNSpec = FCOSFPNSpec()
    """Feature pyramid, P3 to P7."""
    head: FCOSHeadSpec = FCOSHeadSpec()
    """Dense head."""
    pixels: PixelSpec = PixelSpec()
    """Input normalisation."""


DetectorSpec = Annotated[RetinaNetSpec | FasterRCNNSpec | FCOSSpec | RepPointsSpec, Field(discriminator="kind")]
