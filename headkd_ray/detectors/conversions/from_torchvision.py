"""Describe how torchvision's files hold a detector's heads; here is also what its dense detectors have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headkd_ray.detectors.conversions import shapes
from headkd_ray.detectors.conversions.conversion import Conversion
from headkd_ray.detectors.conversions.shapes import ShapeError, State
from headkd_ray.job import Spec

Rename = tuple[str, "str | Callable[[re.Match[str]], str]"]
"""A regular expression of a whole key, and our name for it: a replacement, or what makes one of the match."""

WB = r"(weight|bias)"


@dataclass(frozen=True, kw_only=True)
class TorchvisionConversion(Conversion):
    """A conversion of torchvision's files; backbone and neck are the same for all kinds."""

    renames: Sequence[Rename]
    """Our names for the heads' tensors; the first that matches counts."""
    arranged: Callable[[State], State]
    """Arranges tensors under our names as our heads have them: background goes last or away.

    Raises ShapeError if one that is needed is missing.
    """
    sections: Callable[[State, int], tuple[dict[str, Spec], int]]
    """Makes of arranged tensors and the pyramid's width the heads' specs with torchvision's settings, by their keys in the
    detector's spec, and the number of classes."""
    neck: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the neck that the tensors' shapes tell."""
    overwrites_eps: bool = True
    """Whether the released COCO v1 models run with BatchNorm epsilon 0 (``overwrite_eps``)."""

    def name(self, key: str) -> str | None:
        """Return our name for the tensor ``key`` of a head; None if this kind has no such tensor."""
        for pattern, replacement in self.renames:
            if match := re.fullmatch(pattern, key):
                return match.expand(replacement) if isinstance(replacement, str) else replacement(match)
        return None


def convs(tower: str) -> Callable[[re.Match[str]], str]:
    """Return what names (conv number, tensor) in ``tower``, where in our heads a ReLU follows each conv."""
    return lambda match: f"{tower}.{2 * int(match[1])}.{match[2]}"


DENSE_RENAMES: tuple[Rename, ...] = (
    (rf"head\.classification_head\.cls_logits\.{WB}", r"head.cls_out.\1"),
    (rf"head\.regression_head\.bbox_reg\.{WB}", r"head.box_out.\1"),
    # FCOS's towers are flat, conv, norm, ReLU, as ours are; so were RetinaNet's before torchvision 0.13.
    (rf"head\.classification_head\.conv\.(\d+)\.{WB}", r"head.cls_tower.\1.\2"),
    (rf"head\.regression_head\.conv\.(\d+)\.{WB}", r"head.box_tower.\1.\2"),
    (rf"head\.classification_head\.conv\.(\d+)\.0\.{WB}", convs("head.cls_tower")),
    (rf"head\.regression_head\.conv\.(\d+)\.0\.{WB}", convs("head.box_tower")),
)
DENSE_NECK = {"extra": "conv_p5", "relu_before_p7": True}


def background_dropped(state: State) -> State:
    """Return ``state`` without class 0 of a dense head, which no label ever has; channels are anchor-major."""
    weight, bias, boxes = shapes.need(state, "head.cls_out.weight", "head.cls_out.bias", "head.box_out.bias")
    anchors = len(boxes) // 4
    if anchors == 0 or len(bias) % anchors:
        raise ShapeError(f"a dense head with {len(bias)} scores for {len(boxes)} box outputs a cell")
    return {
        **state,
        "head.cls_out.weight": weight.unflatten(0, (anchors, -1))[:, 1:].flatten(0, 1),
        "head.cls_out.bias": bias.unflatten(0, (anchors, -1))[:, 1:].flatten(0, 1),
    }
