"""torchvision's detector tensor names, turned into ours."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WB = r"(weight|bias)"
_RENAMES = (
    # Optional groups cover the names before torchvision 0.13.
    (r"backbone\.body\.(.+)", r"backbone.body.\1"),
    (rf"backbone\.fpn\.inner_blocks\.(\d+)(?:\.0)?\.{_WB}", r"neck.lateral.\1.\2"),
    (rf"backbone\.fpn\.layer_blocks\.(\d+)(?:\.0)?\.{_WB}", r"neck.output.\1.\2"),
    (rf"backbone\.fpn\.extra_blocks\.p6\.{_WB}", r"neck.extra.0.\1"),
    (rf"backbone\.fpn\.extra_blocks\.p7\.{_WB}", r"neck.extra.1.\1"),
    (rf"rpn\.head\.conv\.{_WB}", r"rpn.tower.0.\1"),
    (rf"rpn\.head\.cls_logits\.{_WB}", r"rpn.cls_out.\1"),
    (rf"rpn\.head\.bbox_pred\.{_WB}", r"rpn.box_out.\1"),
    (rf"roi_heads\.box_head\.fc6\.{_WB}", r"roi.fcs.0.\1"),
    (rf"roi_heads\.box_head\.fc7\.{_WB}", r"roi.fcs.1.\1"),
    (rf"roi_heads\.box_predictor\.cls_score\.{_WB}", r"roi.cls_out.\1"),
    (rf"roi_heads\.box_predictor\.bbox_pred\.{_WB}", r"roi.box_out.\1"),
    (rf"head\.classification_head\.cls_logits\.{_WB}", r"head.cls_out.\1"),
    (rf"head\.regression_head\.bbox_reg\.{_WB}", r"head.box_out.\1"),
    (rf"head\.regression_head\.bbox_ctrness\.{_WB}", r"head.centerness_out.\1"),
    # FCOS's towers are flat, conv, norm, ReLU, as ours are.
    (rf"head\.classification_head\.conv\.(\d+)\.{_WB}", r"head.cls_tower.\1.\2"),
    (rf"head\.regression_head\.conv\.(\d+)\.{_WB}", r"head.box_tower.\1.\2"),
)
_TOWERS = (
    (rf"rpn\.head\.conv\.(\d+)\.0\.{_WB}", "rpn.tower"),
    (rf"head\.classification_head\.conv\.(\d+)\.0\.{_WB}", "head.cls_tower"),
    (rf"head\.regression_head\.conv\.(\d+)\.0\.{_WB}", "head.box_tower"),
)


def torchvision_names(keys: Iterable[str]) -> dict[str, str]:
    """{torchvision key: our name}; keys that no supported model has are left out."""
    keys = list(keys)
    normed_neck = "backbone.fpn.inner_blocks.0.1.weight" in keys
    named = ((key, _normed(key) if normed_neck and key.startswith("backbone.fpn.") else _name(key)) for key in keys)
    return {key: name for key, name in named if name is not None}


def _name(key: str) -> str | None:
    for pattern, replacement in _RENAMES:
        if match := re.fullmatch(pattern, key):
            return match.expand(replacement)
    for pattern, tower in _TOWERS:
        if match := re.fullmatch(pattern, key):
            return f"{tower}.{2 * int(match[1])}.{match[2]}"  # a ReLU follows each conv
    if match := re.fullmatch(r"roi_heads\.box_head\.(\d+)\.([01])\.(\w+)", key):
        return f"roi.convs.{3 * int(match[1]) + int(match[2])}.{match[3]}"  # conv, norm, ReLU
    if match := re.fullmatch(rf"roi_heads\.box_head\.(\d+)\.{_WB}", key):
        return f"roi.fcs.0.{match[2]}"  # the one Linear behind the convs and a Flatten
    return None


def _normed(key: str) -> str | None:
    match = re.fullmatch(r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.([01])\.(\w+)", key)
    return f"neck.{'lateral' if match[1] == 'inner' else 'output'}.{match[2]}.{match[3]}.{match[4]}" if match else None
