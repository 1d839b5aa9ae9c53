"""Read torchvision's fasterrcnn_resnet50_fpn (v1, v2), retinanet_resnet50_fpn and fcos_resnet50_fpn, for any number of classes.

What differs from mmdet goes into the spec: whole-pixel anchors, RoIAlign with 2 samples and no half-pixel shift, P6 on P5 and
a ReLU before P7, unlimited shrinking, least box sizes, 300 RetinaNet detections, FCOS's points, scores and thresholds. Class 0,
background, goes last in the RoI head and away in RetinaNet and FCOS, so our class i is torchvision's i + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from headkd_ray.detectors.build import build_detector
from headkd_ray.detectors.conversions import shapes
from headkd_ray.detectors.fit import fit
from headkd_ray.detectors.weights.loaded import LoadedDetector
from headkd_ray.detectors.weights.torchvision_names import torchvision_kind, torchvision_names
from headkd_ray.errors import CheckpointError

COCO = tuple(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:])
"""The 90 class names of torchvision's COCO models, ten of them "N/A"."""
_FROZEN_NORMS_LACK = "backbone.body.bn1.num_batches_tracked"
"""The released models' frozen norms count no batches; those of a model that was trained here do."""


def is_torchvision(keys: Iterable[str]) -> bool:
    """Return whether a state dict's ``keys`` are those of a torchvision detector."""
    return any(key.startswith("backbone.fpn.") for key in keys)


def load_torchvision(state: Mapping[str, Tensor], source: str = "torchvision") -> LoadedDetector:
    """Build a detector from a torchvision state dict.

    Raises CheckpointError listing every tensor that is missing, unexpected or of another shape.
    """
    names = torchvision_names(state)
    unknown = [f"unexpected: {key}" for key in state if key not in names]
    if unknown:
        raise CheckpointError(unknown, headline=f"{source}: {len(unknown)} tensors belong to no supported torchvision model")
    found = torchvision_kind(state)
    if found is None:
        raise CheckpointError(f"{source}: has no tensors of a head, only of a backbone; it is no whole torchvision detector")
    kind, conversion = found
    with shapes.inferring(source):
        ours = conversion.arranged({name: state[key] for key, name in names.items()})
        neck = shapes.fpn(ours)
        heads, num_classes = conversion.sections(ours, neck.channels)
        backbone = shapes.resnet(ours)
        if conversion.overwrites_eps and num_classes == len(COCO) and _FROZEN_NORMS_LACK not in ours:
            backbone = backbone.replace({"norm_eps": 0.0})
        spec = kind.spec.model_validate({"backbone": backbone, "neck": neck.replace(dict(conversion.neck)), **heads})
    detector = build_detector(spec, num_classes)
    fit(detector, ours, source, {name: key for key, name in names.items()})
    return LoadedDetector(detector, COCO if num_classes == len(COCO) else None, "torchvision")
