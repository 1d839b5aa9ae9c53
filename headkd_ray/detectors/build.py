"""Build a detector from its spec, with backbone weights from a file or from timm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from headkd_ray.detectors.backbone import Backbone
from headkd_ray.detectors.backbone_names import backbone_names
from headkd_ray.detectors.base import Detector, PyramidDetector
from headkd_ray.detectors.dense import DenseDetector
from headkd_ray.detectors.fit import fit
from headkd_ray.detectors.registry import detector_class
from headkd_ray.detectors.safe_load import read_file
from headkd_ray.detectors.state_dict import find_state_dict
from headkd_ray.detectors.two_stage import TwoStageDetector
from headkd_ray.errors import JobError
from headkd_ray.job import PyramidDetectorSpec, WholeDetectorSpec

AnyDetector = DenseDetector | TwoStageDetector
"""A detector of either family with heads on a feature pyramid."""


@overload
def build_detector(spec: PyramidDetectorSpec, num_classes: int, section: str = ...) -> AnyDetector: ...


@overload
def build_detector(spec: WholeDetectorSpec, num_classes: int, section: str = ...) -> Detector: ...


def build_detector(spec: WholeDetectorSpec, num_classes: int, section: str = "student") -> Detector:
    """Build a freshly initialised detector for ``num_classes`` classes, with the backbone weights that ``spec`` names.

    Random numbers come from torch's default generator. Raises JobError for a backbone that timm cannot build (``section`` is
    the job section of its keys), CheckpointError for backbone weights that do not fit.
    """
    make: Any = detector_class(spec)  # Any: the registry pairs each class with its spec, which mypy cannot see
    try:
        detector: Detector = make(spec, num_classes)
    except JobError as error:
        raise JobError([f"{section}.{problem}" for problem in error.problems]) from error
    if isinstance(detector, PyramidDetector) and detector.spec.backbone.weights not in ("none", "timm"):
        load_backbone(detector.backbone, Path(detector.spec.backbone.weights))
    return detector


def load_backbone(backbone: Backbone, path: Path) -> None:
    """Load a classification network's file (timm, torchvision, mmcls) into ``backbone``; its classifier is left out.

    Raises CheckpointError listing every tensor that does not fit.
    """
    own = backbone.body.state_dict()

    def names_of(state: Mapping[str, Tensor]) -> dict[str, str]:
        names = backbone_names(state)
        if not backbone.spec.final_conv:  # the network's last 1x1 conv has no place in a backbone that stops before it
            names = {key: name for key, name in names.items() if not name.startswith(("conv_head.", "bn2."))}
        flat = {key: name.replace(".", "_", 1) for key, name in names.items()}  # some extractors flatten stages.0 to stages_0
        return {key: flat[key] if name not in own and flat[key] in own else name for key, name in names.items()}

    def is_known(state: Mapping[str, Tensor]) -> bool:
        return len(own.keys() & set(names_of(state).values())) > len(own) / 2

    state = find_state_dict(read_file(path), str(path), is_known)
    names = names_of(state)
    fit(backbone.body, {name: state[key] for key, name in names.items()}, str(path), {v: k for k, v in names.items()})
