"""Define GFL's architecture keys. Defaults are mmdet's ``gfl_r50_fpn``, except the backbone, which is the student's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from headkd_ray.job.module_specs import (
    KIND,
    BackboneSpec,
    DenseDetectorSpec,
    DenseHeadSpec,
    FPNSpec,
    PostprocessSpec,
    ProposalSpec,
)
from headkd_ray.job.numbers import Bins, Boxes, Channels, Exponent, Factor, Fraction, Layers, Scale, Weight


class GFLPostprocessSpec(PostprocessSpec):
    """How GFL's raw predictions become detections at test time."""

    nms_iou: Fraction = 0.6
    """IoU above which NMS, within a class, drops the lower-scored detection."""


class GFLHeadSpec(DenseHeadSpec):
    """The dense head of GFL: class scores that also express box quality, and a distribution for each side of a box."""

    convs: Layers = 4
    """Depth of each tower (classification, box): 3x3 conv, norm, ReLU."""
    channels: Channels = 256
    """Width of the towers."""
    norm_groups: Channels | None = 32
    """Groups of the GroupNorm after each tower conv; null = no norm."""
    conv_bias: bool = False
    """Whether tower convs have a bias beside the norm (mmdet: false). Without a norm there is always one."""
    tower_std: Factor | None = 0.01
    """Initial weights of the towers: N(0, tower_std), mmdet's choice for 256 channels; null = He initialisation."""
    base_scale: Scale = 8.0
    """Side of the one square anchor of a cell, in units of the level's stride."""
    reg_max: Bins = 16
    """Largest distance from a cell's point to a side of its box, in units of the stride; there is one bin for each whole number
    from 0 to this."""
    topk: Boxes = 9
    """ATSS: number of anchors per level, the nearest to a ground-truth box's centre, that are candidates for that box."""
    quality_beta: Exponent = 2.0
    """Quality focal loss: exponent of the distance between score and quality."""
    box_weight: Weight = 2.0
    """Weight of the generalised IoU loss."""
    dfl_weight: Weight = 0.25
    """Weight of the distribution focal loss."""
    prior: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Initial foreground probability (bias of the classification layer)."""
    proposals: ProposalSpec = ProposalSpec()
    """Proposals that the head passes to an assistant in training."""
    postprocess: GFLPostprocessSpec = GFLPostprocessSpec()
    """Post-processing of detections at test time."""


class GFLFPNSpec(FPNSpec):
    """Feature pyramid of GFL, P3 to P7."""

    extra: Literal["conv_c5", "conv_p5", "pool"] = "conv_p5"
    """Levels above P5: conv_p5 = two stride-2 3x3 convs, the first on P5; conv_c5 = the first on C5. pool is not allowed."""


class GFLSpec(DenseDetectorSpec):
    """GFL: a dense detector on P3 to P7 whose scores are quality estimates and whose box sides are distributions."""

    kind: Annotated[Literal["gfl"], KIND] = "gfl"
    backbone: BackboneSpec = BackboneSpec()
    """The backbone."""
    neck: GFLFPNSpec = GFLFPNSpec()
    """The feature pyramid, P3 to P7."""
    head: GFLHeadSpec = GFLHeadSpec()
    """The dense head."""
