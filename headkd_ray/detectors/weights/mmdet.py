"""mmdet 2.x and 3.x checkpoints of every kind of detector here (ResNet, MobileNetV2), and HEAD's own students."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headkd_ray.detectors.build import AnyDetector
from headkd_ray.detectors.cascade_rcnn import CascadeRCNN
from headkd_ray.detectors.faster_rcnn import FasterRCNN
from headkd_ray.detectors.fcos import FCOS
from headkd_ray.detectors.fit import fit
from headkd_ray.detectors.reppoints import RepPoints
from headkd_ray.detectors.retinanet import RetinaNet
from headkd_ray.detectors.roi_head import RoIHead
from headkd_ray.detectors.weights import infer
from headkd_ray.detectors.weights.loaded import LoadedDetector
from headkd_ray.detectors.weights.mmdet_names import mmdet_names
from headkd_ray.errors import CheckpointError
from headkd_ray.job import (
    BackboneSpec,
    CascadeRCNNSpec,
    CascadeRPNSpec,
    FasterRCNNSpec,
    FCOSSpec,
    FPNSpec,
    RepPointsSpec,
    RetinaNetSpec,
)

ASSISTANT_STRIDES = (8, 16, 32, 64)
"""HEAD's assistant pools from P3 to P6."""


def is_mmdet(keys: Iterable[str]) -> bool:
    """Whether a state dict's ``keys`` are mmdet's."""
    return any(key.startswith(("neck.lateral_convs.", "bbox_head.", "rpn_head.", "roi_head.bbox_head.")) for key in keys)


def load_mmdet(state: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None, source: str = "mmdet") -> LoadedDetector:
    """A detector from an mmdet state dict and the file's ``meta``; the architecture follows from the tensors' shapes.

    A dense ``rpn_head`` marks a HEAD student: a dense detector whose assistant (``roi_head``) and adapters are returned
    beside it. Raises CheckpointError listing every tensor that is missing, unexpected or of another shape.
    """
    meta = meta or {}
    names = mmdet_names(state)
    unknown = [f"unexpected: {key}" for key in state if key not in names]
    if unknown:
        raise CheckpointError(unknown, headline=f"{source}: {len(unknown)} tensors belong to no supported mmdet model")
    config = _config(meta)
    if "style='caffe'" in config:
        raise CheckpointError(f"{source}: caffe-style backbone (stride in the 1x1 conv, BGR input); only pytorch style is read")

    ours = {name: state[key] for key, name in names.items()}
    if infer.is_fcos(ours) or infer.is_reppoints(ours):
        ours |= _zero_biases(ours)
    with infer.inferring(source):
        detector, assistant, adapters = _build(ours, config)
    # One strict load of everything, so that one error lists everything.
    parts = nn.ModuleDict(dict(detector.named_children()))
    parts["adapters"] = nn.ModuleDict({str(number): adapter for number, adapter in adapters.items()})
    if assistant is not None:
        parts["assistant"] = assistant
    fit(parts, ours, source, {name: key for key, name in names.items()})
    return LoadedDetector(detector, _classes(meta), "mmdet", assistant=assistant, adapters=adapters)


def _build(ours: Mapping[str, Tensor], config: str) -> tuple[AnyDetector, RoIHead | None, dict[int, nn.Linear]]:
    """Detector, assistant and adapters of the shapes in ``ours``, with initial weights."""
    neck = infer.fpn(ours)
    parts: dict[str, Any] = {"backbone": _backbone(ours, config), "neck": neck}
    detector: AnyDetector
    if infer.is_fcos(ours):
        parts["neck"] = _fcos_neck(neck, config)
        detector = _fcos(ours, parts, config)
    elif infer.is_reppoints(ours):
        points, num_classes = infer.reppoints_head(ours)
        detector = RepPoints(RepPointsSpec.model_validate(parts | {"head": points}), num_classes)
    elif any(name.startswith("head.") for name in ours):
        head, num_classes = infer.retina_head(ours)
        detector = RetinaNet(RetinaNetSpec.model_validate(parts | {"head": head}), num_classes)
    elif infer.is_cascade(ours):
        cascade, num_classes = infer.cascade_head(ours, neck.channels)
        parts |= {"rpn": CascadeRPNSpec(convs=infer.rpn(ours).convs), "roi": cascade}
        detector = CascadeRCNN(CascadeRCNNSpec.model_validate(parts), num_classes)
    else:
        roi, num_classes = infer.roi_head(ours, "roi.", neck.channels)
        detector = FasterRCNN(FasterRCNNSpec.model_validate(parts | {"rpn": infer.rpn(ours), "roi": roi}), num_classes)
    assistant = None
    if any(name.startswith("assistant.") for name in ours):
        spec, assistant_classes = infer.roi_head(ours, "assistant.", neck.channels)
        assistant = RoIHead(spec, neck.channels, assistant_classes, ASSISTANT_STRIDES)
    weights = {int(name.split(".")[1]): t for name, t in ours.items() if name.startswith("adapters.") and t.dim() == 2}
    return detector, assistant, {number: nn.Linear(w.shape[1], w.shape[0]) for number, w in sorted(weights.items())}


def _zero_biases(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The biases of a dense head's tower convs if none has one (``bias='auto'`` beside a norm): zeros."""
    towers = ("head.cls_tower.", "head.box_tower.")
    convs = [name for name, tensor in ours.items() if name.startswith(towers) and tensor.dim() == 4]
    biases = {name.removesuffix("weight") + "bias": torch.zeros(ours[name].shape[0]) for name in convs}
    return {} if biases.keys() & ours.keys() else biases


def _fcos(ours: Mapping[str, Tensor], parts: dict[str, Any], config: str) -> FCOS:
    """An FCOS whose head's switches, which no shape tells, are the config's; without a config they are the paper's."""
    head, num_classes = infer.fcos_head(ours)
    if config:
        radius = head.center_radius if "center_sampling=True" in config else None
        switches = {name: f"{name}=True" in config for name in ("norm_on_bbox", "centerness_on_reg")}
        head = head.model_copy(update={"center_radius": radius, **switches})
    return FCOS(FCOSSpec.model_validate(parts | {"head": head}), num_classes)


def _fcos_neck(neck: FPNSpec, config: str) -> FPNSpec:
    """Without a config: mmdet's own FCOS has P6 on P5 and a ReLU before P7, HEAD's students RetinaNet's pyramid."""
    if not config:
        return neck.model_copy(update={"relu_before_p7": neck.extra == "conv_p5"})
    extra = "conv_p5" if "add_extra_convs='on_output'" in config else neck.extra
    return neck.model_copy(update={"extra": extra, "relu_before_p7": "relu_before_extra_convs=True" in config})


def _backbone(ours: Mapping[str, Tensor], config: str) -> BackboneSpec:
    if "backbone.body.conv_stem.weight" in ours:
        slope = re.search(r"type='LeakyReLU',\s*negative_slope=([0-9.]+)", config)
        if slope:
            return infer.mobilenet_v2(ours, float(slope[1]))
        # Without a config the paper's activation is assumed; a config without LeakyReLU means mmdet's default, ReLU6.
        return infer.mobilenet_v2(ours, None if "MobileNetV2" in config else 0.1)
    return infer.resnet(ours)


def _config(meta: Mapping[str, Any]) -> str:
    """The training config as text: 2.x keeps it in ``config``, 3.x in ``cfg``."""
    return str(meta.get("config") or meta.get("cfg") or "")


def _classes(meta: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names: 2.x keeps them in ``CLASSES``, 3.x in ``dataset_meta``."""
    described = meta.get("dataset_meta")
    names = described.get("classes") or described.get("CLASSES") if isinstance(described, Mapping) else meta.get("CLASSES")
    return tuple(str(name) for name in names) if names else None
