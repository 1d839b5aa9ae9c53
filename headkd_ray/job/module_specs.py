"""Define the architecture keys that detectors share: backbone, pyramid, anchors, proposals, post-processing, sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from typing_extensions import Self

from headkd_ray.job.backbone_kwargs import check_kwargs
from headkd_ray.job.labels import check_label
from headkd_ray.job.numbers import Boxes, Channels, Deviation, Factor, Fraction, Layers, Length, Mean, Octaves, Ratio, Scale


class Spec(BaseModel):
    """The base class of every section: unknown keys are errors, values never change after loading.

    A section whose defaults depend on where it is used (the RPN's anchors, the Faster R-CNN's pyramid, ...) is a subclass with
    its own defaults, so that a job that sets one key of a section keeps those defaults for the others. ``from_attributes`` lets
    Python code pass the base class there; its values are then used as they are.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, from_attributes=True
    )

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with other values for some keys: ``job.replace({"teacher.placement": "pool"})``.

        Args:
            changes: dotted key -> value, applied in order; a value may be a whole section.

        Raises:
            pydantic.ValidationError: a key does not exist, or a value is not valid in a job file.
        """
        values = self.model_dump()
        for key, value in changes.items():
            *parents, last = key.split(".")
            section = values
            for name in parents:
                if not isinstance(section.get(name), dict):
                    section[name] = {}
                section = section[name]
            section[last] = value.model_dump() if isinstance(value, Spec) else value
        return self.model_validate(values)


Text = Annotated[str, Field(min_length=1, max_length=4096)]
Labels = dict[Text, Annotated[str, AfterValidator(check_label)]]
"""A label selector of Ray: the labels that a node must have; a value may also be !value, in(a, b) or !in(a, b)."""
Stds = tuple[Deviation, Deviation, Deviation, Deviation]


class BackboneSpec(Spec):
    """A timm backbone, with outputs at strides 4 to 32 (C2 to C5)."""

    name: Text = "resnet18"
    """timm model name, for example resnet18, resnet50, mobilenetv2_100, convnext_tiny. A tag selects among timm's weights:
    resnet18.tv_in1k = torchvision's ImageNet weights (the paper's)."""
    kwargs: Annotated[dict[str, Any], AfterValidator(check_kwargs)] = Field(default_factory=dict)
    """Extra arguments of timm.create_model; only those that shape a network: widths and depths of micro models (for
    example stem_width, channels, layers), img_size, strict_img_size, norm_layer, drop_path_rate. For mobilenetv2_* they are
    stem_width, channels (7), layers (7) and head_width."""
    weights: Text = "none"
    """Initial weights: none (timm's random init), timm (download through timm), or a path to a .safetensors or
    .pth state dict (timm's, torchvision's or mmdet's key names). A relative path is resolved against the command's current
    folder."""
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 1
    """Stages without gradient, counted from the input: 0 = none, 1 = stem and first stage (C2), 2 = also C3, ..., 4 = all.
    Needs initial weights (weights, or student.checkpoint)."""
    norm_eval: bool = True
    """Keep every BatchNorm in eval mode while training (paper: true for ResNet, false for MobileNetV2). Needs initial
    weights (weights, or student.checkpoint): with random ones, its statistics would stay 0 and 1."""
    leaky_slope: Factor | None = None
    """Use LeakyReLU with this negative slope as the backbone's activation (paper's MobileNetV2: 0.1); null keeps timm's."""
    norm_eps: Fraction | None = None
    """Epsilon of every BatchNorm; null keeps timm's (1e-5)."""
    final_conv: bool = False
    """Take C5 after the classifier's last 1x1 conv (paper's MobileNetV2: 1280 channels) instead of before it."""
    stride_in_1x1: bool = False
    """ResNets with bottlenecks: halve the resolution in a stage's first 1x1 conv (Caffe's ResNet, and mmdet's with style
    "caffe") instead of in the 3x3 conv (PyTorch's). Weights fit only one of the two."""


class PixelSpec(Spec):
    """Input normalisation, (pixel - mean) / std on RGB values 0..255; padding is zero after normalisation."""

    mean: tuple[Mean, Mean, Mean] = (123.675, 116.28, 103.53)
    """Mean of R, G, B, in units of 0..255 (ImageNet)."""
    std: tuple[Deviation, Deviation, Deviation] = (58.395, 57.12, 57.375)
    """Standard deviation of R, G, B, in units of 0..255 (ImageNet)."""


class FPNSpec(Spec):
    """The feature pyramid network; its lowest level depends on the detector (P3 for dense ones, P2 for R-CNNs)."""

    channels: Channels = 256
    """Channels of every pyramid level."""
    extra: Literal["conv_c5", "conv_p5", "pool"] = "conv_c5"
    """Levels above P5: conv_c5 = two stride-2 3x3 convs, the first on C5 (paper's RetinaNet); conv_p5 = the first on P5;
    pool = one level, P5 subsampled by 2 (Faster and Cascade R-CNN only)."""
    relu_before_p7: bool = False
    """ReLU between P6 and P7 (torchvision's RetinaNet: true; the paper's: false); no effect for pool."""
    norm: Literal["none", "batch", "group"] = "none"
    """Norms in place of the convs' biases: none; batch = BatchNorm after the lateral and output convs (torchvision's Faster
    R-CNN v2); group = GroupNorm after these and the extra convs (mmdet's RepPoints)."""
    norm_groups: Channels = 32
    """Groups of the GroupNorm; no effect for the other norms."""


class PooledFPNSpec(FPNSpec):
    """The feature pyramid of Faster and Cascade R-CNN, P2 to P6."""

    extra: Literal["conv_c5", "conv_p5", "pool"] = "pool"
    """Levels above P5; Faster and Cascade R-CNN need pool: one level, P5 subsampled by 2."""


class FCOSFPNSpec(FPNSpec):
    """The feature pyramid of FCOS, P3 to P7."""

    extra: Literal["conv_c5", "conv_p5", "pool"] = "conv_p5"
    """Levels above P5: conv_p5 = two stride-2 3x3 convs, the first on P5; conv_c5 = the first on C5. pool is not allowed."""
    relu_before_p7: bool = True
    """ReLU between P6 and P7."""


class ResNet50Spec(BackboneSpec):
    """A timm backbone, ResNet-50 by default."""

    name: Text = "resnet50"
    """timm model name, for example resnet50, resnet18, convnext_tiny. A tag selects among timm's weights:
    resnet50.tv_in1k = torchvision's ImageNet weights (the paper's)."""


class AnchorSpec(Spec):
    """The anchors of a dense head; the base size at each level is base_scale x stride."""

    base_scale: Scale = 4.0
    """Anchor side in units of the level's stride, before the octave scales (RetinaNet 4, RPN 8)."""
    octave_scales: Octaves = 3
    """Anchor scales per octave: base_scale x 2^(i/octave_scales) (RetinaNet 3, RPN 1)."""
    ratios: Annotated[tuple[Ratio, ...], Field(min_length=1, max_length=100)] = (0.5, 1.0, 2.0)
    """Aspect ratios, height / width."""
    rounding: bool = False
    """Round anchors to whole pixels and derive strides from the feature size, as torchvision does (paper: false)."""


class RPNAnchorSpec(AnchorSpec):
    """The anchors of the RPN: one scale per level."""

    base_scale: Scale = 8.0
    """Anchor side in units of the level's stride, before the octave scales."""
    octave_scales: Octaves = 1
    """Anchor scales per octave: base_scale x 2^(i/octave_scales)."""


class ProposalSpec(Spec):
    """How a dense head proposes RoIs."""

    pre_nms: Boxes = 2000
    """Candidates kept per level before NMS, by score."""
    post_nms: Boxes = 1000
    """Proposals kept per image after NMS."""
    nms_iou: Fraction = 0.7
    """IoU above which NMS, within a level, drops the lower-scored proposal."""
    min_size: Length | None = 0.0
    """Width and height that a proposal must exceed, in pixels of the network input; null = no limit."""


class RPNTestProposalSpec(ProposalSpec):
    """How the RPN proposes RoIs at test time."""

    pre_nms: Boxes = 1000
    """Candidates kept per level before NMS, by score."""


class PostprocessSpec(Spec):
    """How raw predictions become detections at test time."""

    pre_nms: Boxes = 1000
    """Candidates kept per level before NMS (dense heads)."""
    score: Fraction = 0.05
    """Score that a detection must exceed."""
    nms_iou: Fraction = 0.5
    """IoU above which NMS, within a class, drops the lower-scored detection."""
    max_detections: Boxes = 100
    """Detections kept per image."""
    min_size: Length | None = None
    """Width and height that a detection must exceed, in pixels of the network input; null = no limit (paper)."""


class RoIPostprocessSpec(PostprocessSpec):
    """How a RoI head's raw predictions become detections at test time."""

    min_size: Length | None = None
    """Width and height that a detection must exceed, in pixels of the network input; null = no limit."""


class SamplerSpec(Spec):
    """Random sampling of positives and negatives in one image."""

    size: Boxes = 512
    """Samples per image."""
    positive_fraction: Fraction = 0.25
    """Largest share of positives among them."""


class RPNSamplerSpec(SamplerSpec):
    """Random sampling of the RPN's anchors in one image."""

    size: Boxes = 256
    """Samples per image."""
    positive_fraction: Fraction = 0.5
    """Largest share of positives among them."""


class DenseHeadSpec(Spec):
    """The keys that every dense head has."""

    if TYPE_CHECKING:  # each subclass declares them among its own keys
        convs: Layers
        proposals: ProposalSpec
        postprocess: PostprocessSpec


class WholeDetectorSpec(Spec):
    """The keys that every detector has."""

    if TYPE_CHECKING:  # each subclass declares it among its own keys
        pixels: PixelSpec

    kind: str
    checkpoint: Text | None = None
    """A whole trained detector to start from: a folder of ours (model.safetensors + model.json), or an mmdet or torchvision
    file; a path, a URI, or hf://owner/name@revision on the Hugging Face Hub. It must have the architecture that the other keys
    describe; its outputs are matched with the data's classes by name, and outputs for classes that it does not know start
    fresh. A relative path is resolved against the command's current folder. null = backbone.weights, and everything else
    fresh. A resumed run does not read it again."""
    classes: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Class names in the order of the outputs in student.checkpoint, when that file does not name them; null = read from it.
    (The classes that are learned are the data's.)"""


class PyramidDetectorSpec(WholeDetectorSpec):
    """The keys that every detector with a backbone, a feature pyramid and heads on it has."""

    if TYPE_CHECKING:  # each subclass declares them among its own keys
        backbone: BackboneSpec
        neck: FPNSpec


class DenseDetectorSpec(PyramidDetectorSpec):
    """The keys that every dense detector has; each kind overrides the defaults."""

    backbone: BackboneSpec
    neck: FPNSpec
    head: DenseHeadSpec
    pixels: PixelSpec = PixelSpec()
    """Input normalisation."""


KIND = Field(
    description="The detector's kind: retinanet, fcos, gfl or reppoints (a dense head of anchors, of points, of anchors with\n"
    "box distributions or of point sets on P3 to P7), faster_rcnn or cascade_rcnn (an RPN on P2 to P6, and on P2 to P5 one\n"
    "RoI head or a cascade of three), transformers (a DETR, or another detector, of the package transformers)."
)
"""The field of ``kind``, shared by the specs of all detectors."""
