"""Fewer classes than a file has: torchvision's COCO models have 90 outputs, ten of them for classes that COCO never used."""

from __future__ import annotations

from dataclasses import replace

import torch

from headkd_ray.detectors.build import build_detector
from headkd_ray.detectors.fcos import FCOS
from headkd_ray.detectors.fit import fit
from headkd_ray.detectors.retinanet import RetinaNet
from headkd_ray.detectors.weights.loaded import LoadedDetector

UNUSED = "N/A"
"""torchvision's name of such a class."""


def drop_unused_classes(loaded: LoadedDetector) -> LoadedDetector:
    """``loaded`` without the outputs of classes named "N/A", so that its 80 others are COCO's; unchanged if it has none.

    The other outputs keep their logits; softmax scores change by the share of the dropped ones, which training drove to 0.
    """
    if not loaded.classes or UNUSED not in loaded.classes:
        return loaded
    kept = torch.tensor([i for i, name in enumerate(loaded.classes) if name != UNUSED])
    old = loaded.detector
    state, total = old.state_dict(), old.num_classes
    if isinstance(old, RetinaNet | FCOS):
        rows = {"head.cls_out": (torch.arange(old.head.anchors.per_cell)[:, None] * total + kept).flatten()}
    else:
        rows = {"roi.cls_out": torch.cat([kept, torch.tensor([total])])}  # background stays last
        if not old.roi.spec.class_agnostic:
            rows["roi.box_out"] = (4 * kept[:, None] + torch.arange(4)).flatten()
    for layer, index in rows.items():
        for tensor in ("weight", "bias"):
            state[f"{layer}.{tensor}"] = state[f"{layer}.{tensor}"][index]
    detector = build_detector(old.spec, len(kept))
    fit(detector, state, loaded.source)
    return replace(loaded, detector=detector, classes=tuple(name for name in loaded.classes if name != UNUSED))
