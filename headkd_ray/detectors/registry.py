"""The registry of detector kinds: one line each with its spec, its class, the spec of its head, whose class its own names, and
how other libraries' files hold its weights."""

from __future__ import annotations

from typing import Any, NamedTuple

from headkd_ray.detectors.base import DenseHead, Detector, RoIHead
from headkd_ray.detectors.cascade_rcnn import CascadeRCNN
from headkd_ray.detectors.conversions import (
    cascade_rcnn_weights,
    faster_rcnn_weights,
    fcos_weights,
    gfl_weights,
    reppoints_weights,
    retinanet_weights,
)
from headkd_ray.detectors.conversions.from_mmdet import MMDetConversion
from headkd_ray.detectors.conversions.from_torchvision import TorchvisionConversion
from headkd_ray.detectors.dense import DenseDetector
from headkd_ray.detectors.faster_rcnn import FasterRCNN
from headkd_ray.detectors.fcos import FCOS
from headkd_ray.detectors.gfl import GFL
from headkd_ray.detectors.hf_detector import TransformersDetector
from headkd_ray.detectors.reppoints import RepPoints
from headkd_ray.detectors.retinanet import RetinaNet
from headkd_ray.detectors.two_stage import TwoStageDetector
from headkd_ray.job import (
    CascadeHeadSpec,
    CascadeRCNNSpec,
    FasterRCNNSpec,
    FCOSHeadSpec,
    FCOSSpec,
    GFLHeadSpec,
    GFLSpec,
    RepPointsHeadSpec,
    RepPointsSpec,
    RetinaHeadSpec,
    RetinaNetSpec,
    RoIHeadSpec,
    Spec,
    TransformersSpec,
    WholeDetectorSpec,
)


class Kind(NamedTuple):
    """A kind of detector: the specs that a job file gives, the class that is built from them, and foreign weights of it."""

    spec: type[WholeDetectorSpec]
    head_spec: type[Spec] | None
    """The spec of its head, which can be an assistant; None = it has none of its own on a feature pyramid."""
    detector: type[Detector]
    mmdet: MMDetConversion | None = None
    """How mmdet's files hold it; None = they are not read."""
    torchvision: TorchvisionConversion | None = None
    """How torchvision's files hold it; None = they are not read."""


KINDS: tuple[Kind, ...] = (
    Kind(RetinaNetSpec, RetinaHeadSpec, RetinaNet, retinanet_weights.MMDET, retinanet_weights.TORCHVISION),
    Kind(FCOSSpec, FCOSHeadSpec, FCOS, fcos_weights.MMDET, fcos_weights.TORCHVISION),
    Kind(GFLSpec, GFLHeadSpec, GFL, gfl_weights.MMDET),
    Kind(RepPointsSpec, RepPointsHeadSpec, RepPoints, reppoints_weights.MMDET),
    Kind(FasterRCNNSpec, RoIHeadSpec, FasterRCNN, faster_rcnn_weights.MMDET, faster_rcnn_weights.TORCHVISION),
    Kind(CascadeRCNNSpec, CascadeHeadSpec, CascadeRCNN, cascade_rcnn_weights.MMDET),
    Kind(TransformersSpec, None, TransformersDetector),
)

_DETECTORS: dict[type[Spec], type[Any]] = {kind.spec: kind.detector for kind in KINDS}
_HEADS: dict[type[Spec], type[Any]] = {
    kind.head_spec: kind.detector.head_class
    for kind in KINDS
    if kind.head_spec is not None and issubclass(kind.detector, DenseDetector | TwoStageDetector)
}


def detector_class(spec: Spec) -> type[Detector]:
    """Return the class of detector that is built from ``spec``."""
    return _DETECTORS[type(spec)]


def head_class(spec: Spec) -> type[DenseHead[Any]] | type[RoIHead]:
    """Return the class of head that is built from ``spec``."""
    return _HEADS[type(spec)]
