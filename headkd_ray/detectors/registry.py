"""The registry of detector kinds: one line each with its spec, the spec of its head, and its class, which names its head's."""

from __future__ import annotations

from typing import Any, NamedTuple

from headkd_ray.detectors.base import DenseHead, RoIHead
from headkd_ray.detectors.cascade_rcnn import CascadeRCNN
from headkd_ray.detectors.dense import DenseDetector
from headkd_ray.detectors.faster_rcnn import FasterRCNN
from headkd_ray.detectors.fcos import FCOS
from headkd_ray.detectors.gfl import GFL
from headkd_ray.detectors.reppoints import RepPoints
from headkd_ray.detectors.retinanet import RetinaNet
from headkd_ray.detectors.two_stage import TwoStageDetector
from headkd_ray.job import (
    CascadeHeadSpec,
    CascadeRCNNSpec,
    DenseDetectorSpec,
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
    TwoStageDetectorSpec,
)


class Kind(NamedTuple):
    """A kind of detector: the specs that a job file gives, and the class that is built from them."""

    spec: type[DenseDetectorSpec] | type[TwoStageDetectorSpec]
    head_spec: type[Spec]
    detector: type[DenseDetector] | type[TwoStageDetector]


KINDS: tuple[Kind, ...] = (
    Kind(RetinaNetSpec, RetinaHeadSpec, RetinaNet),
    Kind(FCOSSpec, FCOSHeadSpec, FCOS),
    Kind(GFLSpec, GFLHeadSpec, GFL),
    Kind(RepPointsSpec, RepPointsHeadSpec, RepPoints),
    Kind(FasterRCNNSpec, RoIHeadSpec, FasterRCNN),
    Kind(CascadeRCNNSpec, CascadeHeadSpec, CascadeRCNN),
)

_DETECTORS: dict[type[Spec], type[Any]] = {kind.spec: kind.detector for kind in KINDS}
_HEADS: dict[type[Spec], type[Any]] = {kind.head_spec: kind.detector.head_class for kind in KINDS}


def detector_class(spec: Spec) -> type[DenseDetector] | type[TwoStageDetector]:
    """Return the class of detector that is built from ``spec``."""
    return _DETECTORS[type(spec)]


def head_class(spec: Spec) -> type[DenseHead[Any]] | type[RoIHead]:
    """Return the class of head that is built from ``spec``."""
    return _HEADS[type(spec)]
