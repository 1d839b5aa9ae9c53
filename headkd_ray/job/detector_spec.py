"""Define a detector's architecture keys, which the job file, the checkpoint's meta and the model builders share.

Defaults are the paper's R18 RetinaNet student (official code, ``configs/_base_/models``) and the FCOS of the paper's TF-HEAD;
the two-stage detectors have their own module. A detector's classes are not defined here: they come with the data.
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
    WholeDetectorSpec,
)
from headkd_ray.job.numbers import Channels, Exponent, Factor, Fraction, Layers, Scale
from headkd_ray.job.reppoints_spec import RepPointsSpec
from headkd_ray.job.transformers_spec import TransformersSpec
from headkd_ray.job.two_stage_specs import CascadeRCNNSpec, FasterRCNNSpec


class RetinaHeadSpec(DenseHeadSpec):
    """The dense head of RetinaNet."""

    convs: Layers = 4
    """Depth of each tower (classification, box): 3x3 conv + ReLU."""
    channels: Channels = 256
    """Width of the towers."""
    tower_std: Factor | None = 0.01
    """Initial weights of the towers: N(0, tower_std), the paper's choice for 256 channels; null = He initialisation, for narrow
    towers, where 0.01 lets the signal vanish."""
    anchors: AnchorSpec = AnchorSpec()
    """The anchors."""
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
    """Proposals that the head passes to an assistant in training (paper section 2: 2000 / 1000 / 0.7)."""
    postprocess: PostprocessSpec = PostprocessSpec()
    """Post-processing of detections at test time."""


class FCOSHeadSpec(DenseHeadSpec):
    """The dense head of FCOS."""

    convs: Layers = 4
    """Depth of each tower (classification, box): 3x3 conv, norm, ReLU."""
    channels: Channels = 256
    """Width of the towers."""
    norm_groups: Channels | None = 32
    """Groups of the GroupNorm after each tower conv; null = no norm."""
    conv_bias: bool = True
    """Whether tower convs have a bias beside the norm (mmdet's conv_bias), as TF-HEAD's FCOS assistant has; the research
    branch's FCOS students have none. Without a norm there is always one."""
    tower_std: Factor | None = 0.01
    """Initial weights of the towers: N(0, tower_std), the paper's choice for 256 channels; null = He initialisation."""
    centerness_on_reg: bool = True
    """Predict centerness from the box tower; false = from the classification tower."""
    norm_on_bbox: bool = True
    """Predict boxes by ReLU, as distances in units of the level's stride; false = by exp, as distances in pixels."""
    box_loss: Literal["giou", "iou"] = "giou"
    """Box loss: giou = 1 - generalised IoU; iou = -log IoU (the research branch's FCOS students)."""
    points: Literal["centre", "corner"] = "centre"
    """Location of a cell's point: centre = (x + 1/2, y + 1/2) x stride (paper); corner = (x, y) x stride with strides derived
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
    """Score of a detection: product = class probability x centerness, where the class probability alone selects the candidates
    (paper); sqrt = square root of that product throughout (torchvision)."""
    proposals: ProposalSpec = ProposalSpec()
    """Proposals that the head passes to an assistant in training, by class probability alone."""
    postprocess: PostprocessSpec = PostprocessSpec()
    """Post-processing of detections at test time."""


class RetinaNetSpec(DenseDetectorSpec):
    """RetinaNet: a dense detector on P3 to P7."""

    kind: Annotated[Literal["retinanet"], KIND] = "retinanet"
    backbone: BackboneSpec = BackboneSpec()
    """The backbone."""
    neck: FPNSpec = FPNSpec()
    """The feature pyramid, P3 to P7."""
    head: RetinaHeadSpec = RetinaHeadSpec()
    """The dense head."""


class FCOSSpec(DenseDetectorSpec):
    """FCOS: a dense detector without anchors on P3 to P7."""

    kind: Annotated[Literal["fcos"], KIND] = "fcos"
    backbone: BackboneSpec = BackboneSpec()
    """The backbone."""
    neck: FCOSFPNSpec = FCOSFPNSpec()
    """The feature pyramid, P3 to P7."""
    head: FCOSHeadSpec = FCOSHeadSpec()
    """The dense head."""


DetectorSpec = Annotated[
    RetinaNetSpec | FCOSSpec | GFLSpec | RepPointsSpec | FasterRCNNSpec | CascadeRCNNSpec | TransformersSpec,
    Field(discriminator="kind"),
]
"""The spec of any detector, chosen by ``kind``. ``headkd_ray.detectors.registry`` has the classes built from these specs."""

SPECS: dict[str, type[WholeDetectorSpec]] = {
    spec.model_fields["kind"].default: spec for spec in get_args(get_args(DetectorSpec)[0])
}
"""Kind -> spec, for every kind of detector."""
