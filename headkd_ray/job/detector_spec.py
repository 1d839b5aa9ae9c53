"""The architecture keys of a detector: shared by the job file, the checkpoint's meta and the model builders.

Defaults are the paper's R18 RetinaNet student (official code, ``configs/_base_/models``) and the FCOS of the paper's TF-HEAD;
the two-stage detectors have their own module. A detector's classes are not here: they come with the data.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from headkd_ray.job.gfl_spec import GFLSpec
from headkd_ray.job.module_specs import (
    KIND,
    AnchorSpec,
    BackboneSpec,
    DenseDetectorSpec,
    DenseHeadSpec,
    FCOSFPNSpec,
    FPNSpec,
    PostprocessSpec,
    ProposalSpec,
)
from headkd_ray.job.numbers import Channels, Exponent, Factor, Fraction, Layers, Scale
from headkd_ray.job.reppoints_spec import RepPointsSpec
from headkd_ray.job.two_stage_specs import CascadeRCNNSpec, FasterRCNNSpec, TwoStageDetectorSpec


class RetinaHeadSpec(DenseHeadSpec):
    """RetinaNet's dense head."""

    convs: Layers = 4
    """Depth of each tower (classification, box): 3x3 conv + ReLU."""
    channels: Channels = 256
    """Width of the towers."""
    tower_std: Factor | None = 0.01
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
    focal_gamma: Exponent = 2.0
    """Focal loss gamma."""
    prior: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Initial foreground probability (bias of the classification layer)."""
    clamp_shrink: bool = True
    """Limit how much a box may shrink from its anchor to 16/1000, as growth always is to 1000/16 (torchvision: false)."""
    proposals: ProposalSpec = ProposalSpec()
    """Proposals that the head gives to an assistant while training (paper section 2: 2000 / 1000 / 0.7)."""
    postprocess: PostprocessSpec = PostprocessSpec()
    """Detections at test time."""


class FCOSHeadSpec(DenseHeadSpec):
    """FCOS's dense head."""

    convs: Layers = 4
    """Depth of each tower (classification, box): 3x3 conv, norm, ReLU."""
    channels: Channels = 256
    """Width of the towers."""
    norm_groups: Channels | None = 32
    """Groups of the GroupNorm after each tower conv; null = no norm."""
    tower_std: Factor | None = 0.01
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
    center_radius: Scale | None = 1.5
    """A point is positive only within this many strides of its box's centre, along both axes; null = anywhere in the box."""
    regress_ranges: tuple[Scale, Scale, Scale, Scale] = (64.0, 128.0, 256.0, 512.0)
    """Largest distance from a point to a side of its box on P3, P4, P5 and P6, in pixels of the network input, and the
    smallest on the next level; P7 takes all above."""
    focal_alpha: Fraction = 0.25
    """Focal loss alpha."""
    focal_gamma: Exponent = 2.0
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


class RetinaNetSpec(DenseDetectorSpec):
    """RetinaNet: a dense detector on P3 to P7."""

    kind: Annotated[Literal["retinanet"], KIND] = "retinanet"
    backbone: BackboneSpec = BackboneSpec()
    """Backbone."""
    neck: FPNSpec = FPNSpec()
    """Feature pyramid, P3 to P7."""
    head: RetinaHeadSpec = RetinaHeadSpec()
    """Dense head."""


class FCOSSpec(DenseDetectorSpec):
    """FCOS: a dense detector without anchors on P3 to P7."""

    kind: Annotated[Literal["fcos"], KIND] = "fcos"
    backbone: BackboneSpec = BackboneSpec()
    """Backbone."""
    neck: FCOSFPNSpec = FCOSFPNSpec()
    """Feature pyramid, P3 to P7."""
    head: FCOSHeadSpec = FCOSHeadSpec()
    """Dense head."""


DetectorSpec = Annotated[
    RetinaNetSpec | FCOSSpec | GFLSpec | RepPointsSpec | FasterRCNNSpec | CascadeRCNNSpec, Field(discriminator="kind")
]
"""Any detector's spec; ``kind`` chooses. ``headkd_ray.detectors.registry`` has the classes that are built from them."""

SPECS: dict[str, type[DenseDetectorSpec] | type[TwoStageDetectorSpec]] = {
    spec.model_fields["kind"].default: spec for spec in get_args(get_args(DetectorSpec)[0])
}
"""Kind -> its spec, of every kind."""
