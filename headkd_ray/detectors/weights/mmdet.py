"""Read mmdet 2.x and 3.x checkpoints of every kind of detector here (ResNet, pytorch and caffe style; MobileNetV2), and HEAD's
own students."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from headkd_ray.detectors.base import DenseHead, RoIHead
from headkd_ray.detectors.build import AnyDetector
from headkd_ray.detectors.conversions import shapes
from headkd_ray.detectors.conversions.from_mmdet import DenseFromMMDet, MMDetConversion
from headkd_ray.detectors.dense import STRIDES
from headkd_ray.detectors.fit import fit
from headkd_ray.detectors.registry import Kind, head_class
from headkd_ray.detectors.two_stage import ROI_LEVELS
from headkd_ray.detectors.weights.loaded import LoadedDetector
from headkd_ray.detectors.weights.mmdet_config import MMDetConfig
from headkd_ray.detectors.weights.mmdet_names import mmdet_assistants, mmdet_kind, mmdet_names
from headkd_ray.errors import CheckpointError
from headkd_ray.job import BackboneSpec, PixelSpec, WholeDetectorSpec

_NORMALISATION = ("data_preprocessor.mean", "data_preprocessor.std")
_STEMS = ("backbone.body.conv1.weight", "backbone.body.conv_stem.weight")
_DEFORMABLE = re.compile(r"\.(conv2\.conv_offset|conv2_offset|conv\.conv_offset)\.")
"""Offsets of deformable convs: in a ResNet's blocks, spelled in two ways, and in a tower; RepPoints' own have none."""


def is_mmdet(keys: Iterable[str]) -> bool:
    """Return whether a state dict's ``keys`` are mmdet's."""
    return any(key.startswith(("neck.lateral_convs.", "bbox_head.", "rpn_head.", "roi_head.bbox_head.")) for key in keys)


Adapter = nn.Linear | nn.Conv2d


class MMDetModel(NamedTuple):
    """An mmdet file's detector and, if it is a student of the official HEAD, what helped it learn."""

    loaded: LoadedDetector[AnyDetector]
    assistants: dict[str, DenseHead[Any] | RoIHead]
    """The assistants by their official names: rcnn, cascade, or that of an extra head (fcos, retina, reppoints)."""
    adapters: dict[int, Adapter]
    """The adapters by their number in the official config; a 1x1 conv between maps, a Linear on rows."""


def load_mmdet(
    state: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None, source: str = "mmdet"
) -> LoadedDetector[AnyDetector]:
    """Build a detector from an mmdet state dict and the file's ``meta``; the architecture follows from the tensors' shapes.

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
    """Load what :func:`load_mmdet` does, with the assistants and the adapters of one of HEAD's students.

    The assistants are the ``roi_head`` beside a dense student's ``rpn_head``, a dense head's ``_extra_heads`` and the
    ``cascade_roi_head`` beside a Faster R-CNN's ``roi_head``.
    """
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
    found = mmdet_kind(state)
    if found is None:
        raise CheckpointError(f"{source}: has no tensors of a head, only of {_rooms(state)}; it is no whole mmdet detector")
    kind, conversion = found
    config = MMDetConfig.of(meta, source)
    ours = {name: state[key] for key, name in names.items()}
    with shapes.inferring(source):
        pixels, is_bgr = config.pixels(normalisation)
        if is_bgr:
            ours |= {stem: ours[stem].flip(1) for stem in _STEMS if stem in ours}
        spec, num_classes = _spec(ours, kind, conversion, config, pixels)
        make: Any = kind.detector
        detector: AnyDetector = make(spec, num_classes)
        assistants, adapters = _assistants(state, detector), _adapters(ours)
    # One strict load of everything, so that one error lists everything.
    parts = nn.ModuleDict(dict(detector.named_children()))
    parts["adapters"] = nn.ModuleDict({str(number): adapter for number, adapter in adapters.items()})
    parts["assistants"] = nn.ModuleDict(assistants)
    fit(parts, ours, source, {name: key for key, name in names.items()})
    notes = (f"{source}: {len(averaged)} ema_* tensors, mmdet's second set of weights, are not used",) if averaged else ()
    classes = _classes(meta, detector.num_classes, source)
    return MMDetModel(LoadedDetector(detector, classes, "mmdet", notes=notes), assistants, adapters)


def _spec(
    ours: Mapping[str, Tensor], kind: Kind, conversion: MMDetConversion, config: MMDetConfig, pixels: PixelSpec
) -> tuple[WholeDetectorSpec, int]:
    """Return the spec of the detector in ``ours`` and its number of classes."""
    neck = shapes.fpn(ours)
    backbone = _backbone(ours, config)
    heads, num_classes = conversion.sections(ours, neck.channels)
    if isinstance(conversion, DenseFromMMDet):
        neck = config.dense_neck(neck, conversion.relu_before_p7)
        head = conversion.switches(heads["head"], config.dense_head) if config else heads["head"]
        heads = {"head": head.replace({"postprocess": config.rules(head.postprocess, "rpn")})}
    else:
        rpn, roi = heads["rpn"], heads["roi"]
        heads = {
            "rpn": rpn.replace({"test_proposals": config.rules(rpn.test_proposals, "rpn")}),
            "roi": roi.replace({"postprocess": config.rules(roi.postprocess, "rcnn")}),
        }
    return kind.spec.model_validate({"backbone": backbone, "neck": neck, "pixels": pixels, **heads}), num_classes


def _assistants(state: Mapping[str, Tensor], detector: AnyDetector) -> dict[str, DenseHead[Any] | RoIHead]:
    """Return the assistants of the shapes in ``state``, under mmdet's names, with initial weights."""
    channels, made = detector.spec.neck.channels, {}
    for name, (conversion, names) in mmdet_assistants(state).items():
        try:
            spec, num_classes = conversion.detection_head({ours: state[key] for key, ours in names.items()}, channels)
        except shapes.ShapeError as error:
            raise shapes.ShapeError([f"assistant {name}: {problem}" for problem in error.problems], error.headline) from error
        make: Any = head_class(spec)
        strides = detector.strides[:ROI_LEVELS] if issubclass(make, RoIHead) else STRIDES
        made[name] = make(spec, channels, num_classes, strides)
    return made


def _adapters(ours: Mapping[str, Tensor]) -> dict[int, Adapter]:
    """Return the adapters of the shapes in ``ours``, with initial weights."""
    made: dict[int, Adapter] = {}
    for name, weight in sorted(ours.items()):
        if match := re.fullmatch(r"adapters\.(\d+)\.weight", name):
            own, theirs, bias = weight.shape[1], weight.shape[0], f"adapters.{match[1]}.bias" in ours
            made[int(match[1])] = (
                nn.Conv2d(own, theirs, 1, bias=bias) if weight.dim() == 4 else nn.Linear(own, theirs, bias=bias)
            )
    return dict(sorted(made.items()))


def _rooms(state: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({key.partition(".")[0] for key in state}))


def _backbone(ours: Mapping[str, Tensor], config: MMDetConfig) -> BackboneSpec:
    if "backbone.body.conv_stem.weight" in ours:
        # Without a config the paper's activation is assumed; a config without LeakyReLU means mmdet's default, ReLU6.
        return shapes.mobilenet_v2(ours, config.leaky_slope if config else 0.1)
    spec = shapes.resnet(ours)
    has_bottlenecks = "backbone.body.layer1.0.conv3.weight" in ours  # mmdet's other blocks are the same in both styles
    return spec.replace({"stride_in_1x1": config.is_caffe and has_bottlenecks})


def _classes(meta: Mapping[str, Any], outputs: int, source: str) -> tuple[str, ...] | None:
    """Return the class names: 2.x keeps them in ``CLASSES``, 3.x in ``dataset_meta``, a single one maybe as a bare string."""
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
