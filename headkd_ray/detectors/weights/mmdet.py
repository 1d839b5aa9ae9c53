"""mmdet 2.x and 3.x checkpoints of every kind of detector here (ResNet, pytorch and caffe style; MobileNetV2), and HEAD's own
students."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headkd_ray.detectors.build import AnyDetector
from headkd_ray.detectors.cascade_rcnn import CascadeRCNN
from headkd_ray.detectors.faster_rcnn import FasterRCNN
from headkd_ray.detectors.fcos import FCOS
from headkd_ray.detectors.fit import fit
from headkd_ray.detectors.gfl import GFL
from headkd_ray.detectors.reppoints import RepPoints
from headkd_ray.detectors.retinanet import RetinaNet
from headkd_ray.detectors.roi_head import BoxHead
from headkd_ray.detectors.two_stage import ROI_LEVELS
from headkd_ray.detectors.weights import infer
from headkd_ray.detectors.weights.loaded import LoadedDetector
from headkd_ray.detectors.weights.mmdet_config import MMDetConfig
from headkd_ray.detectors.weights.mmdet_names import mmdet_names
from headkd_ray.errors import CheckpointError
from headkd_ray.job import (
    BackboneSpec,
    CascadeRCNNSpec,
    CascadeRPNSpec,
    FasterRCNNSpec,
    FCOSSpec,
    GFLSpec,
    PixelSpec,
    RepPointsSpec,
    RetinaNetSpec,
)

_NORMALISATION = ("data_preprocessor.mean", "data_preprocessor.std")
_STEMS = ("backbone.body.conv1.weight", "backbone.body.conv_stem.weight")
_DEFORMABLE = re.compile(r"\.(conv2\.conv_offset|conv2_offset|conv\.conv_offset)\.")
"""In a ResNet's blocks, spelled in two ways, and in a tower; RepPoints' own deformable convs have no such tensor."""


def is_mmdet(keys: Iterable[str]) -> bool:
    """Whether a state dict's ``keys`` are mmdet's."""
    return any(key.startswith(("neck.lateral_convs.", "bbox_head.", "rpn_head.", "roi_head.bbox_head.")) for key in keys)


class MMDetModel(NamedTuple):
    """What an mmdet file holds: a detector and, of the official HEAD's students, what helped it learn."""

    loaded: LoadedDetector
    assistant: BoxHead | None
    adapters: dict[int, nn.Linear]
    """By their number: 0, 1, ... = AKD on fc1, fc2, ...; the last = CKD."""


def load_mmdet(state: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None, source: str = "mmdet") -> LoadedDetector:
    """A detector from an mmdet state dict and the file's ``meta``; the architecture follows from the tensors' shapes.

    What no shape tells comes from the training config in ``meta``, where mmdet's own files have it: a caffe-style backbone
    (stride in the 1x1 convs), input in BGR and its normalisation, FCOS's switches, thresholds at test time. A file without it
    counts as pytorch style with RGB input and ImageNet's mean and deviation: a caffe-style one then loads and detects badly.
    The detector that is returned always takes RGB; a network trained on BGR has its first conv's channels turned around.

    Two kinds of tensors besides the network's are known: 3.x's ``data_preprocessor``, the normalisation, and the ``ema_*`` that
    2.x keeps of a training with averaged weights, which are left out with a note.

    Raises CheckpointError listing every tensor that is missing, unexpected or of another shape, or if there are more or fewer
    class names than outputs.
    """
    return load_mmdet_model(state, meta, source).loaded


def load_mmdet_model(state: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None, source: str = "mmdet") -> MMDetModel:
    """As :func:`load_mmdet`, with the assistant and the adapters of a HEAD student: a dense detector whose head is called
    ``rpn_head`` and whose assistant ``roi_head``."""
    meta = meta or {}
    averaged = [key for key in state if key.startswith("ema_")]
    normalisation = {key.rpartition(".")[2]: tensor for key, tensor in state.items() if key in _NORMALISATION}
    state = {key: tensor for key, tensor in state.items() if key not in _NORMALISATION and not key.startswith("ema_")}
    deformable = [key for key in state if _DEFORMABLE.search(key)]
    if deformable:
        raise CheckpointError(f"{source}: deformable convs (dcn, dcn_on_last_conv) are not supported: {deformable[0]}, ...")
    state = {key: tensor for key, tensor in state.items() if not key.endswith(".integral.project")}  # GFL's constant 0, 1, ...
    names = mmdet_names(state)
    unknown = [f"unexpected: {key}" for key in state if key not in names]
    if unknown:
        raise CheckpointError(unknown, headline=f"{source}: {len(unknown)} tensors belong to no supported mmdet model")
    config = MMDetConfig.of(meta, source)
    ours = {name: state[key] for key, name in names.items()}
    if infer.is_fcos(ours) or infer.is_gfl(ours) or infer.is_reppoints(ours):
        ours |= _zero_biases(ours)
    with infer.inferring(source):
        pixels, is_bgr = config.pixels(normalisation)
        if is_bgr:
            ours |= {stem: ours[stem].flip(1) for stem in _STEMS if stem in ours}
        detector, assistant, adapters = _build(ours, config, pixels)
    # One strict load of everything, so that one error lists everything.
    parts = nn.ModuleDict(dict(detector.named_children()))
    parts["adapters"] = nn.ModuleDict({str(number): adapter for number, adapter in adapters.items()})
    if assistant is not None:
        parts["assistant"] = assistant
    fit(parts, ours, source, {name: key for key, name in names.items()})
    notes = (f"{source}: {len(averaged)} ema_* tensors, mmdet's second set of weights, are not used",) if averaged else ()
    classes = _classes(meta, detector.num_classes, source)
    return MMDetModel(LoadedDetector(detector, classes, "mmdet", notes=notes), assistant, adapters)


def _build(
    ours: Mapping[str, Tensor], config: MMDetConfig, pixels: PixelSpec
) -> tuple[AnyDetector, BoxHead | None, dict[int, nn.Linear]]:
    """Detector, assistant and adapters of the shapes in ``ours``, with initial weights."""
    neck = infer.fpn(ours)
    parts: dict[str, Any] = {"backbone": _backbone(ours, config), "neck": neck, "pixels": pixels}
    detector: AnyDetector
    if any(name.startswith("head.") for name in ours):
        detector = _dense(ours, parts | {"neck": config.dense_neck(neck, infer.is_fcos(ours))}, config)
    else:
        detector = _two_stage(ours, parts, config)
    assistant = None
    if any(name.startswith("assistant.") for name in ours):
        spec, assistant_classes = infer.roi_head(ours, "assistant.", neck.channels)
        assistant = BoxHead(spec, neck.channels, assistant_classes, detector.strides[:ROI_LEVELS])
    weights = {int(name.split(".")[1]): t for name, t in ours.items() if name.startswith("adapters.") and t.dim() == 2}
    return detector, assistant, {number: nn.Linear(w.shape[1], w.shape[0]) for number, w in sorted(weights.items())}


def _zero_biases(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The biases of a dense head's tower convs if none has one (``bias='auto'`` beside a norm): zeros."""
    towers = ("head.cls_tower.", "head.box_tower.")
    convs = [name for name, tensor in ours.items() if name.startswith(towers) and tensor.dim() == 4]
    biases = {name.removesuffix("weight") + "bias": torch.zeros(ours[name].shape[0]) for name in convs}
    return {} if biases.keys() & ours.keys() else biases


def _dense(ours: Mapping[str, Tensor], parts: dict[str, Any], config: MMDetConfig) -> AnyDetector:
    if infer.is_fcos(ours):
        fcos, num_classes = infer.fcos_head(ours)
        fcos = config.fcos_head(fcos)
        fcos = fcos.replace({"postprocess": config.rules(fcos.postprocess, "rpn")})
        return FCOS(FCOSSpec.model_validate(parts | {"head": fcos}), num_classes)
    if infer.is_gfl(ours):
        gfl, num_classes = infer.gfl_head(ours)
        gfl = gfl.replace({"postprocess": config.rules(gfl.postprocess, "rpn")})
        return GFL(GFLSpec.model_validate(parts | {"head": gfl}), num_classes)
    if infer.is_reppoints(ours):
        points, num_classes = infer.reppoints_head(ours)
        points = points.replace({"postprocess": config.rules(points.postprocess, "rpn")})
        return RepPoints(RepPointsSpec.model_validate(parts | {"head": points}), num_classes)
    head, num_classes = infer.retina_head(ours)
    head = head.replace({"postprocess": config.rules(head.postprocess, "rpn")})
    return RetinaNet(RetinaNetSpec.model_validate(parts | {"head": head}), num_classes)


def _two_stage(ours: Mapping[str, Tensor], parts: dict[str, Any], config: MMDetConfig) -> AnyDetector:
    rpn = infer.rpn(ours)
    proposals = config.rules(rpn.test_proposals, "rpn")
    if infer.is_cascade(ours):
        cascade, num_classes = infer.cascade_head(ours, parts["neck"].channels)
        cascade = cascade.replace({"postprocess": config.rules(cascade.postprocess, "rcnn")})
        parts |= {"rpn": CascadeRPNSpec(convs=rpn.convs, test_proposals=proposals), "roi": cascade}
        return CascadeRCNN(CascadeRCNNSpec.model_validate(parts), num_classes)
    roi, num_classes = infer.roi_head(ours, "roi.", parts["neck"].channels)
    roi = roi.replace({"postprocess": config.rules(roi.postprocess, "rcnn")})
    parts |= {"rpn": rpn.replace({"test_proposals": proposals}), "roi": roi}
    return FasterRCNN(FasterRCNNSpec.model_validate(parts), num_classes)


def _backbone(ours: Mapping[str, Tensor], config: MMDetConfig) -> BackboneSpec:
    if "backbone.body.conv_stem.weight" in ours:
        # Without a config the paper's activation is assumed; a config without LeakyReLU means mmdet's default, ReLU6.
        return infer.mobilenet_v2(ours, config.leaky_slope if config else 0.1)
    spec = infer.resnet(ours)
    has_bottlenecks = "backbone.body.layer1.0.conv3.weight" in ours  # mmdet's other blocks are the same in both styles
    return spec.replace({"stride_in_1x1": config.is_caffe and has_bottlenecks})


def _classes(meta: Mapping[str, Any], outputs: int, source: str) -> tuple[str, ...] | None:
    """Class names: 2.x keeps them in ``CLASSES``, 3.x in ``dataset_meta``; one class may stand there as a bare string."""
    described = meta.get("dataset_meta")
    names = described.get("classes") or described.get("CLASSES") if isinstance(described, Mapping) else meta.get("CLASSES")
    if not names:
        return None
    classes = (names,) if isinstance(names, str) else tuple(str(name) for name in names)
    if len(classes) != outputs:
        raise CheckpointError(
            f"{source}: its meta names {len(classes)} classes, but the network has {outputs} outputs, as when a fine-tuned "
            "file keeps its origin's names; correct meta['CLASSES'] (3.x: meta['dataset_meta']['classes']) in the file"
        )
    return classes
