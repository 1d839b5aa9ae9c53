"""Define the keys of a detector of the package transformers: DETR and what came after it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from headkd_ray.job.module_specs import KIND, PixelSpec, Spec, Text, WholeDetectorSpec
from headkd_ray.job.numbers import Boxes, Fraction, Pixels


class QueryPostprocessSpec(Spec):
    """How the answers of queries become detections at test time; there is no NMS."""

    score: Fraction = 0.0
    """Score that a detection must exceed."""
    max_detections: Boxes = 300
    """Detections kept per image, the best first. (transformers keeps 100 of Deformable DETR's, and of RT-DETR's as many as
    there are queries.)"""


class TransformersSpec(WholeDetectorSpec):
    """A model of transformers' AutoModelForObjectDetection, whose queries answer with boxes: DETR, Deformable DETR, RT-DETR,
    D-FINE, ...  Needs pip install 'headkd-ray[teachers]'."""

    kind: Annotated[Literal["transformers"], KIND] = "transformers"
    checkpoint: Text | None = None
    """A trained detector to start from: a folder that transformers' save_pretrained or a run of this kind wrote; a path, a URI,
    or hf://owner/name@revision on the Hugging Face Hub. Its outputs are matched with the data's classes by name, and outputs
    for classes that it does not know start fresh. A relative path is resolved against the command's current folder. null =
    random weights. A resumed run does not read it again."""
    model: Text | None = None
    """Architecture, the model_type in its config.json: rt_detr, rt_detr_v2, d_fine, deformable_detr, conditional_detr, detr and
    more. null = that of student.checkpoint, with its config and its pixels."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the architecture's config class in transformers, for example {d_model: 128, decoder_layers: 3}; omitted ones
    have its defaults or, if model is null, the values of student.checkpoint. backbone_config is a mapping of the same sort,
    with its own model_type: a backbone of transformers (rt_detr_resnet, resnet, swin, ...), or {model_type: timm_backbone,
    backbone: resnet50}. Without student.checkpoint all weights are random: nothing is downloaded."""
    input_size: tuple[Pixels, Pixels] | None = None
    """Height and width in pixels to which each view is stretched in front of the network. Architectures without a mask for
    padding need it, and were trained so: 640 x 640 for RT-DETR and D-FINE. null = that of student.checkpoint, if model is null;
    otherwise views keep their shape, and the network is told by a mask what is padding (DETR, Deformable DETR, ...)."""
    pixels: PixelSpec = PixelSpec()
    """Input normalisation. RT-DETR's and D-FINE's published weights need mean 0 and std 255."""
    postprocess: QueryPostprocessSpec = QueryPostprocessSpec()
    """Post-processing of detections at test time."""
