"""A detector from its spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headkd_ray.detectors.backbone import Backbone
from headkd_ray.detectors.backbone_names import backbone_names
from headkd_ray.detectors.dense import DenseDetector
from headkd_ray.detectors.fit import fit
from headkd_ray.detectors.registry import detector_class
from headkd_ray.detectors.safe_load import read_file, state_dict_of
from headkd_ray.detectors.two_stage import TwoStageDetector
from headkd_ray.job import DenseDetectorSpec, TwoStageDetectorSpec

AnyDetector = DenseDetector | TwoStageDetector
"""The two families."""


def build_detector(spec: DenseDetectorSpec | TwoStageDetectorSpec, num_classes: int) -> AnyDetector:
    """A freshly initialised detector for ``num_classes`` classes, with the backbone weights that ``spec`` names.

    Random numbers come from torch's default generator. Raises JobError for a backbone that timm cannot build, CheckpointError
    for backbone weights that do not fit.
    """
    make: Any = detector_class(spec)  # which takes this very spec, as the registry says
    detector: AnyDetector = make(spec, num_classes)
    if spec.backbone.weights not in ("none", "timm"):
        load_backbone(detector.backbone, Path(spec.backbone.weights))
    return detector


def load_backbone(backbone: Backbone, path: Path) -> None:
    """Load a classification net's file (timm, torchvision, mmcls) into ``backbone``; its classifier is left out.

    Raises CheckpointError listing every tensor that does not fit.
    """
    state, _ = state_dict_of(read_file(path), str(path))
    names = backbone_names(state)
    if not backbone.spec.final_conv:  # the net's last 1x1 conv has no place in a backbone that stops before it
        names = {key: name for key, name in names.items() if not name.startswith(("conv_head.", "bn2."))}
    own = backbone.body.state_dict()
    flat = {key: name.replace(".", "_", 1) for key, name in names.items()}  # some extractors flatten stages.0 to stages_0
    names = {key: flat[key] if name not in own and flat[key] in own else name for key, name in names.items()}
    fit(backbone.body, {name: state[key] for key, name in names.items()}, str(path), {v: k for k, v in names.items()})
