"""mmdet 2.x and 3.x checkpoints: RetinaNet and Faster R-CNN (ResNet, MobileNetV2), and HEAD's own students."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from headkd_ray.detectors.faster_rcnn import FasterRCNN
from headkd_ray.detectors.fit import fit
from headkd_ray.detectors.retinanet import RetinaNet
from headkd_ray.detectors.roi_head import RoIHead
from headkd_ray.detectors.weights import infer
from headkd_ray.detectors.weights.loaded import LoadedDetector
from headkd_ray.detectors.weights.mmdet_names import mmdet_names
from headkd_ray.errors import CheckpointError
from headkd_ray.job import BackboneSpec, FasterRCNNSpec, RetinaNetSpec

ASSISTANT_STRIDES = (8, 16, 32, 64)
"""HEAD's assistant pools from P3 to P6."""


def is_mmdet(keys: Iterable[str]) -> bool:
    """Whether a state dict's ``keys`` are mmdet's."""
    return any(key.startswith(("neck.lateral_convs.", "bbox_head.", "rpn_head.", "roi_head.bbox_head.")) for key in keys)


def load_mmdet(state: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None, source: str = "mmdet") -> LoadedDetector:
    """A detector from an mmdet state dict and the file's ``meta``; the architecture follows from the tensors' shapes.

    ``rpn_head.retina_cls`` marks a HEAD student: a RetinaNet whose assistant (``roi_head``) and adapters are returned beside
    it. Raises CheckpointError listing every tensor that is missing, unexpected or of another shape.
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
    with infer.inferring(source):
        detector, assistant, adapters = _build(ours, config)
    # One strict load of everything, so that one error lists everything.
    parts = nn.ModuleDict(dict(detector.named_children()))
    parts["adapters"] = nn.ModuleDict({str(number): adapter for number, adapter in adapters.items()})
    if assistant is not None:
        parts["assistant"] = assistant
    fit(parts, ours, source, {name: key for key, name in names.items()})
    return LoadedDetector(detector, _classes(meta), "mmdet", assistant=assistant, adapters=adapters)


def _build(ours: Mapping[str, Tensor], config: str) -> tuple[RetinaNet | FasterRCNN, RoIHead | None, dict[int, nn.Linear]]:
    """Detector, assistant and adapters of the shapes in ``ours``, with initial weights."""
    neck = infer.fpn(ours)
    parts: dict[str, Any] = {"backbone": _backbone(ours, config), "neck": neck}
    detector: RetinaNet | FasterRCNN
    if any(name.startswith("head.") for name in ours):
        head, num_classes = infer.retina_head(ours)
        detector = RetinaNet(RetinaNetSpec.model_validate(parts | {"head": head}), num_classes)
    else:
        roi, num_classes = infer.roi_head(ours, "roi.", neck.channels)
        detector = FasterRCNN(FasterRCNNSpec.model_validate(parts | {"rpn": infer.rpn(ours), "roi": roi}), num_classes)
    assistant = None
    if any(name.startswith("assistant.") for name in ours):
        spec, assistant_classes = infer.roi_head(ours, "assistant.", neck.channels)
        assistant = RoIHead(spec, neck.channels, assistant_classes, ASSISTANT_STRIDES)
    weights = {int(name.split(".")[1]): t for name, t in ours.items() if name.startswith("adapters.") and t.dim() == 2}
    return detector, assistant, {number: nn.Linear(w.shape[1], w.shape[0]) for number, w in sorted(weights.items())}


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
