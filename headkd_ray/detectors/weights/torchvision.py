"""torchvision checkpoints: fasterrcnn_resnet50_fpn (v1, v2), retinanet_resnet50_fpn, fcos_resnet50_fpn; any number of classes.

What differs from mmdet goes into the spec: whole-pixel anchors, RoIAlign with 2 samples and no half-pixel shift, P6 on P5 and
a ReLU before P7, unlimited shrinking, least box sizes, 300 RetinaNet detections, FCOS's points, scores and thresholds. Class 0,
background, goes last in the RoI head and away in RetinaNet and FCOS, so our class i is torchvision's i + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from headkd_ray.detectors.build import build_detector
from headkd_ray.detectors.dense import STRIDES
from headkd_ray.detectors.fit import fit
from headkd_ray.detectors.weights import infer
from headkd_ray.detectors.weights.loaded import LoadedDetector
from headkd_ray.detectors.weights.torchvision_names import torchvision_names
from headkd_ray.errors import CheckpointError
from headkd_ray.job import BackboneSpec, FasterRCNNSpec, FCOSSpec, RetinaNetSpec

COCO = tuple(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:])
"""The 90 class names of torchvision's COCO models, ten of them "N/A"."""


def is_torchvision(keys: Iterable[str]) -> bool:
    """Whether a state dict's ``keys`` are those of a torchvision detector."""
    return any(key.startswith("backbone.fpn.") for key in keys)


def load_torchvision(state: Mapping[str, Tensor], source: str = "torchvision") -> LoadedDetector:
    """A detector from a torchvision state dict.

    Raises CheckpointError listing every tensor that is missing, unexpected or of another shape.
    """
    names = torchvision_names(state)
    unknown = [f"unexpected: {key}" for key in state if key not in names]
    if unknown:
        raise CheckpointError(unknown, headline=f"{source}: {len(unknown)} tensors belong to no supported torchvision model")
    ours = {name: state[key] for key, name in names.items()}
    spec: RetinaNetSpec | FasterRCNNSpec | FCOSSpec
    with infer.inferring(source):
        if any(name.startswith("roi.") for name in ours):
            ours = _background_last(ours)
            spec, num_classes = _faster_rcnn(ours)
        else:
            ours = _background_dropped(ours)
            spec, num_classes = _fcos(ours) if infer.is_fcos(ours) else _retinanet(ours)
    if spec.kind == "fcos":
        ours |= {f"head.scales.{level}": torch.tensor(1.0) for level in range(len(STRIDES))}  # torchvision has none
    detector = build_detector(spec, num_classes)
    fit(detector, ours, source, {name: key for key, name in names.items()})
    return LoadedDetector(detector, COCO if num_classes == len(COCO) else None, "torchvision")


def _background_last(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Class 0 of the RoI head goes to the end of the scores and out of the boxes."""
    weight, bias, box_weight, box_bias = infer.need(
        ours, "roi.cls_out.weight", "roi.cls_out.bias", "roi.box_out.weight", "roi.box_out.bias"
    )
    return ours | {
        "roi.cls_out.weight": weight.roll(-1, dims=0),
        "roi.cls_out.bias": bias.roll(-1, dims=0),
        "roi.box_out.weight": box_weight[4:],
        "roi.box_out.bias": box_bias[4:],
    }


def _background_dropped(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Class 0 of RetinaNet or FCOS, which no label ever has, goes; channels are anchor-major."""
    weight, bias, boxes = infer.need(ours, "head.cls_out.weight", "head.cls_out.bias", "head.box_out.bias")
    anchors = len(boxes) // 4
    if anchors == 0 or len(bias) % anchors:
        raise CheckpointError(f"a dense head with {len(bias)} scores for {len(boxes)} box outputs a cell")
    return ours | {
        "head.cls_out.weight": weight.unflatten(0, (anchors, -1))[:, 1:].flatten(0, 1),
        "head.cls_out.bias": bias.unflatten(0, (anchors, -1))[:, 1:].flatten(0, 1),
    }


def _backbone(ours: Mapping[str, Tensor], num_classes: int) -> BackboneSpec:
    """The released COCO v1 models run with BatchNorm epsilon 0 (``overwrite_eps``); their frozen norms count no batches."""
    released = num_classes == len(COCO) and "backbone.body.bn1.num_batches_tracked" not in ours
    return infer.resnet(ours).replace({"norm_eps": 0.0 if released else None})


def _faster_rcnn(ours: Mapping[str, Tensor]) -> tuple[FasterRCNNSpec, int]:
    neck, rpn = infer.fpn(ours), infer.rpn(ours)
    roi, num_classes = infer.roi_head(ours, "roi.", neck.channels)
    few, more = {"min_size": 1e-3, "pre_nms": 1000, "post_nms": 1000}, {"min_size": 1e-3, "pre_nms": 2000, "post_nms": 2000}
    rpn = rpn.replace(
        {
            "anchors": rpn.anchors.replace({"rounding": True}),
            "clamp_shrink": False,
            "train_proposals": rpn.train_proposals.replace(more),
            "test_proposals": rpn.test_proposals.replace(few),
        }
    )
    roi = roi.replace(
        {
            "sampling_ratio": 2,
            "aligned": False,
            "clamp_shrink": False,
            "postprocess": roi.postprocess.replace({"min_size": 1e-2}),
        }
    )
    parts = {"backbone": _backbone(ours, num_classes), "neck": neck, "rpn": rpn, "roi": roi}
    return FasterRCNNSpec.model_validate(parts), num_classes


def _retinanet(ours: Mapping[str, Tensor]) -> tuple[RetinaNetSpec, int]:
    head, num_classes = infer.retina_head(ours)
    head = head.replace(
        {
            "anchors": head.anchors.replace({"rounding": True}),
            "clamp_shrink": False,
            "postprocess": head.postprocess.replace({"max_detections": 300}),
        }
    )
    neck = infer.fpn(ours).replace({"extra": "conv_p5", "relu_before_p7": True})
    return RetinaNetSpec(backbone=_backbone(ours, num_classes), neck=neck, head=head), num_classes


def _fcos(ours: Mapping[str, Tensor]) -> tuple[FCOSSpec, int]:
    head, num_classes = infer.fcos_head(ours)
    rules = head.postprocess.replace({"score": 0.2, "nms_iou": 0.6})
    head = head.replace({"points": "corner", "score": "sqrt", "postprocess": rules})
    parts = {
        # Unlike the other released models this one runs with the usual epsilon.
        "backbone": infer.resnet(ours),
        "neck": infer.fpn(ours).replace({"extra": "conv_p5", "relu_before_p7": True}),
        "head": head,
    }
    return FCOSSpec.model_validate(parts), num_classes
