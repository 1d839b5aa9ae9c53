"""Define RepPoints' architecture keys.

Defaults are mmdet's ``reppoints_moment_r50_fpn_gn-neck+head``, the teacher of the paper's research branch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from headkd_ray.job.module_specs import (
    KIND,
    DenseDetectorSpec,
    DenseHeadSpec,
    FPNSpec,
    PostprocessSpec,
    ProposalSpec,
    ResNet50Spec,
)
from headkd_ray.job.numbers import Channels, Deviation, Exponent, Factor, Fraction, Layers, Scale, Weight


class RepPointsHeadSpec(DenseHeadSpec):
    """The dense head of RepPoints: nine points per cell, refined once, whose spread defines the box."""

    convs: Layers = 3
    """Depth of each tower (classification, points): 3x3 conv, norm, ReLU."""
    channels: Channels = 256
    """Width of the towers."""
    point_channels: Channels = 256
    """Width of the three layers after the towers: the conv before the initial points, and the two deformable convs that sample
    the towers at these points, to classify and to refine them."""
    norm_groups: Channels | None = 32
    """Groups of the GroupNorm after each tower conv; null = no norm."""
    conv_bias: bool = False
    """Whether tower convs have a bias beside the norm (mmdet: false). Without a norm there is always one."""
    tower_std: Factor | None = 0.01
    """Initial weights of the towers and of the conv before the initial points: N(0, tower_std), mmdet's choice for 256
    channels; null = He initialisation, for narrow ones, where 0.01 lets the signal vanish."""
    gradient_mul: Fraction = 0.1
    """Share of the gradient that reaches the initial points through the deformable convs that sample there."""
    moment_mul: Fraction = 0.01
    """Share of the gradient that reaches the two learned factors that scale the points' spread to half the box sides."""
    base_scale: Scale = 4.0
    """A ground-truth box is an initial target on the coarsest level whose base_scale x stride is at most sqrt(width x height),
    in pixels, or on P3 if there is none; point losses are in units of base_scale x stride."""
    positive_iou: Fraction = 0.5
    """IoU of the initial points' box with a ground-truth box from which a cell is positive for classes and refinement."""
    negative_iou: Fraction = 0.4
    """IoU below which a cell is negative; between the two it is ignored."""
    focal_alpha: Fraction = 0.25
    """Focal loss alpha."""
    focal_gamma: Exponent = 2.0
    """Focal loss gamma."""
    prior: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Initial foreground probability (bias of the classification layer)."""
    smooth_l1_beta: Deviation = 0.11
    """Point losses are quadratic below this difference, in units of base_scale x stride, and linear above."""
    init_weight: Weight = 0.5
    """Weight of the loss of the initial points' boxes."""
    refine_weight: Weight = 1.0
    """Weight of the loss of the refined points' boxes."""
    proposals: ProposalSpec = ProposalSpec()
    """Proposals that the head passes to an assistant in training, from the refined points."""
    postprocess: PostprocessSpec = PostprocessSpec()
    """Post-processing of detections at test time."""


class RepPointsFPNSpec(FPNSpec):
    """The feature pyramid of RepPoints, P3 to P7."""

    norm: Literal["none", "batch", "group"] = "group"
    """Norms in place of the convs' biases: none; batch = BatchNorm after the lateral and output convs; group = GroupNorm after
    these and the extra convs."""


class RepPointsSpec(DenseDetectorSpec):
    """RepPoints: a dense detector on P3 to P7 whose boxes are sets of points."""

    kind: Annotated[Literal["reppoints"], KIND] = "reppoints"
    backbone: ResNet50Spec = ResNet50Spec()
    """The backbone."""
    neck: RepPointsFPNSpec = RepPointsFPNSpec()
    """The feature pyramid, P3 to P7."""
    head: RepPointsHeadSpec = RepPointsHeadSpec()
    """The dense head."""
