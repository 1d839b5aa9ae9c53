"""mmdet's tensor names, turned into ours: a detector's ``backbone. neck. head. rpn. roi.``, HEAD's ``assistant. adapters.``"""

from __future__ import annotations

import re
from collections.abc import Iterable

from headkd_ray.detectors.backbone_names import mmdet_name

_RETINA = {"cls_convs": "cls_tower", "reg_convs": "box_tower", "retina_cls": "cls_out", "retina_reg": "box_out"}
_FCOS = {"cls_convs": "cls_tower", "reg_convs": "box_tower", "cls": "cls_out", "reg": "box_out", "centerness": "centerness_out"}
_RPN = {"rpn_cls": "cls_out", "rpn_reg": "box_out"}
_ROI = {"shared_fcs": "fcs", "fc_cls": "cls_out", "fc_reg": "box_out"}


def mmdet_names(keys: Iterable[str]) -> dict[str, str]:
    """{mmdet key: our name}; keys that no supported model has are left out.

    RetinaNet's and FCOS's head is ``bbox_head`` in plain mmdet and ``rpn_head`` in HEAD's two-headed students, whose
    ``roi_head`` is the assistant; in Faster and Cascade R-CNN the same two are RPN and RoI
    head.
    """
    keys = list(keys)
    is_retina = any(".retina_cls." in key for key in keys)
    is_fcos = any(re.match(r"(?:bbox|rpn)_head\.(?:conv|fcos)_centerness\.", key) for key in keys)
    is_normed = any(re.match(r"(?:bbox|rpn)_head\.cls_convs\.\d+\.gn\.", key) for key in keys)
    laterals = len({key.split(".")[2] for key in keys if key.startswith("neck.lateral_convs.")})
    named = (
        (key, (_fcos_name(key, is_normed) if is_fcos else None) or _name(key, is_retina, is_retina or is_fcos, laterals))
        for key in keys
    )
    return {key: name for key, name in named if name is not None}


def _name(key: str, is_retina: bool, is_dense: bool, laterals: int) -> str | None:
    room, _, rest = key.partition(".")
    if room == "backbone":
        return f"backbone.body.{mmdet_name(rest)}"
    if match := re.fullmatch(r"neck\.(lateral|fpn)_convs\.(\d+)\.conv\.(weight|bias)", key):
        kind, number, tensor = match[1], int(match[2]), match[3]
        if kind == "lateral":
            return f"neck.lateral.{number}.{tensor}"
        return f"neck.output.{number}.{tensor}" if number < laterals else f"neck.extra.{number - laterals}.{tensor}"
    if match := re.fullmatch(r"_distiller\._adapts\.(\d+)\.(weight|bias)", key):
        return f"adapters.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"roi_head\.bbox_head\.(\w+?)((?:\.\d+)?\.(?:weight|bias))", key):
        part = _ROI.get(match[1])
        return f"{'assistant' if is_dense else 'roi'}.{part}{match[2]}" if part else None
    if not is_dense and (match := re.fullmatch(r"roi_head\.bbox_head\.(\d+)\.(\w+?)((?:\.\d+)?\.(?:weight|bias))", key)):
        part = _ROI.get(match[2])  # of a stage of a cascade
        return f"roi.stages.{match[1]}.{part}{match[3]}" if part else None
    if is_retina and (match := re.fullmatch(r"(?:bbox|rpn)_head\.(cls|reg)_convs\.(\d+)\.conv\.(weight|bias)", key)):
        return f"head.{_RETINA[match[1] + '_convs']}.{2 * int(match[2])}.{match[3]}"  # a ReLU follows each conv
    if is_retina and (match := re.fullmatch(r"(?:bbox|rpn)_head\.(retina_cls|retina_reg)\.(weight|bias)", key)):
        return f"head.{_RETINA[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"rpn_head\.rpn_conv\.(?:(\d+)\.conv\.)?(weight|bias)", key):
        return f"rpn.tower.{2 * int(match[1] or 0)}.{match[2]}"
    if match := re.fullmatch(r"rpn_head\.(rpn_cls|rpn_reg)\.(weight|bias)", key):
        return f"rpn.{_RPN[match[1]]}.{match[2]}"
    return None


def _fcos_name(key: str, is_normed: bool) -> str | None:
    room, _, rest = key.partition(".")
    if room not in ("bbox_head", "rpn_head"):
        return None
    if match := re.fullmatch(r"(cls_convs|reg_convs)\.(\d+)\.(conv|gn)\.(weight|bias)", rest):
        place = (3 if is_normed else 2) * int(match[2]) + (match[3] == "gn")  # conv, norm if any, ReLU
        return f"head.{_FCOS[match[1]]}.{place}.{match[4]}"
    if match := re.fullmatch(r"(?:conv|fcos)_(cls|reg|centerness)\.(weight|bias)", rest):  # fcos_ before mmdet 2.6
        return f"head.{_FCOS[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"scales\.(\d+)\.scale", rest):
        return f"head.scales.{match[1]}"
    return None
