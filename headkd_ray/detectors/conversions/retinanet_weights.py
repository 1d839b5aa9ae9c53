"""Recognise and convert RetinaNet in mmdet's and torchvision's files."""

from __future__ import annotations

from headkd_ray.detectors.conversions import shapes
from headkd_ray.detectors.conversions.from_mmdet import DenseFromMMDet
from headkd_ray.detectors.conversions.from_torchvision import (
    DENSE_NECK,
    DENSE_RENAMES,
    TorchvisionConversion,
    background_dropped,
)
from headkd_ray.detectors.conversions.shapes import ShapeError, State
from headkd_ray.job import RetinaHeadSpec, Spec


def _head(state: State) -> tuple[RetinaHeadSpec, int]:
    cls_out, box_out = shapes.need(state, "head.cls_out.weight", "head.box_out.weight")
    spec = RetinaHeadSpec(convs=shapes.count(state, r"head\.cls_tower\.(\d+)\."), channels=cls_out.shape[1])
    anchors = len(spec.anchors.ratios) * spec.anchors.octave_scales
    if box_out.shape[0] != 4 * anchors:
        raise ShapeError(f"a dense head with {box_out.shape[0] / 4:g} anchors a cell; only {anchors} is supported")
    return spec, cls_out.shape[0] // anchors


def _torchvision_sections(state: State, in_channels: int) -> tuple[dict[str, Spec], int]:
    """Infer the head, with torchvision's whole-pixel anchors, unlimited shrinking and 300 detections."""
    head, num_classes = _head(state)
    changes = {
        "anchors": head.anchors.replace({"rounding": True}),
        "clamp_shrink": False,
        "postprocess": head.postprocess.replace({"max_detections": 300}),
    }
    return {"head": head.replace(changes)}, num_classes


MMDET = DenseFromMMDet(
    has=r"(?:bbox|rpn)_head\.retina_cls\.",
    layers={"retina_cls": "cls_out", "retina_reg": "box_out"},
    head=_head,
    norms=False,
)
TORCHVISION = TorchvisionConversion(
    has=r"head\.",
    lacks=r"head\.regression_head\.bbox_ctrness\.",  # FCOS's
    renames=DENSE_RENAMES,
    arranged=background_dropped,
    sections=_torchvision_sections,
    neck=DENSE_NECK,
)
