"""mmdet's tensor names, turned into ours: a detector's ``backbone. neck. head. rpn. roi.``, HEAD's ``assistant. adapters.``"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from headkd_ray.detectors.backbone_names import mmdet_name

_TOWERS = {"cls_convs": "cls_tower", "reg_convs": "box_tower"}
_RETINA = {"retina_cls": "cls_out", "retina_reg": "box_out"}
_FCOS = {
    "conv_cls": "cls_out",
    "conv_reg": "box_out",
    "conv_centerness": "centerness_out",
    "fcos_cls": "cls_out",  # before mmdet 2.6
    "fcos_reg": "box_out",
    "fcos_centerness": "centerness_out",
}
_GFL = {"gfl_cls": "cls_out", "gfl_reg": "box_out"}
_REPPOINTS = {
    "reppoints_pts_init_conv": "init_conv",
    "reppoints_pts_init_out": "init_out",
    "reppoints_cls_conv": "cls_conv",
    "reppoints_cls_out": "cls_out",
    "reppoints_pts_refine_conv": "refine_conv",
    "reppoints_pts_refine_out": "refine_out",
}
_RPN = {"rpn_cls": "cls_out", "rpn_reg": "box_out"}
_ROI = {"shared_fcs": "fcs", "fc_cls": "cls_out", "fc_reg": "box_out"}


def mmdet_names(keys: Iterable[str]) -> dict[str, str]:
    """{mmdet key: our name}; keys that no supported model has are left out.

    A dense detector's head is ``bbox_head`` in plain mmdet and ``rpn_head`` in HEAD's two-headed students, whose
    ``roi_head`` is the assistant; in Faster and Cascade R-CNN the same two are RPN and RoI head.
    """
    keys = list(keys)
    dense = _dense_layers(keys)
    normed_neck = any(re.match(r"neck\.lateral_convs\.\d+\.gn\.", key) for key in keys)
    # RetinaNet's towers have no norm here.
    normed_towers = dense is not _RETINA and any(re.match(r"(?:bbox|rpn)_head\.cls_convs\.\d+\.gn\.", key) for key in keys)
    laterals = len({key.split(".")[2] for key in keys if key.startswith("neck.lateral_convs.")})

    def name_of(key: str) -> str | None:
        room, _, rest = key.partition(".")
        if room == "backbone":
            return f"backbone.body.{mmdet_name(rest)}"
        if room == "neck":
            return _neck_name(rest, laterals, normed_neck)
        if dense is not None and room in ("bbox_head", "rpn_head"):
            return _dense_name(rest, dense, normed_towers)
        return _name(key, dense is not None)

    return {key: name for key in keys if (name := name_of(key)) is not None}


def _dense_layers(keys: list[str]) -> Mapping[str, str] | None:
    """The layers behind the towers of the dense head that ``keys`` have; None = no dense head."""
    if any(".retina_cls." in key for key in keys):
        return _RETINA
    if any(re.match(r"(?:bbox|rpn)_head\.(?:conv|fcos)_centerness\.", key) for key in keys):
        return _FCOS
    if any(re.match(r"(?:bbox|rpn)_head\.gfl_cls\.", key) for key in keys):
        return _GFL
    return _REPPOINTS if any(re.match(r"(?:bbox|rpn)_head\.reppoints_", key) for key in keys) else None


def _neck_name(rest: str, laterals: int, is_normed: bool) -> str | None:
    match = re.fullmatch(r"(lateral|fpn)_convs\.(\d+)\.(conv|gn)\.(weight|bias)", rest)
    if match is None or (match[3] == "gn" and not is_normed):
        return None
    number, last = int(match[2]), match[4]
    if is_normed:
        last = f"{int(match[3] == 'gn')}.{last}"
    if match[1] == "lateral":
        return f"neck.lateral.{number}.{last}"
    return f"neck.output.{number}.{last}" if number < laterals else f"neck.extra.{number - laterals}.{last}"


def _dense_name(rest: str, layers: Mapping[str, str], is_normed: bool) -> str | None:
    if match := re.fullmatch(r"(cls_convs|reg_convs)\.(\d+)\.(conv|gn)\.(weight|bias)", rest):
        if match[3] == "gn" and not is_normed:
            return None
        place = (3 if is_normed else 2) * int(match[2]) + (match[3] == "gn")  # conv, norm if any, ReLU
        return f"head.{_TOWERS[match[1]]}.{place}.{match[4]}"
    if match := re.fullmatch(r"(\w+)\.(weight|bias)", rest):
        return f"head.{layers[match[1]]}.{match[2]}" if match[1] in layers else None
    if layers in (_FCOS, _GFL) and (match := re.fullmatch(r"scales\.(\d+)\.scale", rest)):
        return f"head.scales.{match[1]}"
    return "head.moment_transfer" if layers is _REPPOINTS and rest == "moment_transfer" else None


def _name(key: str, is_dense: bool) -> str | None:
    if match := re.fullmatch(r"_distiller\._adapts\.(\d+)\.(weight|bias)", key):
        return f"adapters.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"roi_head\.bbox_head\.(\w+?)((?:\.\d+)?\.(?:weight|bias))", key):
        part = _ROI.get(match[1])
        return f"{'assistant' if is_dense else 'roi'}.{part}{match[2]}" if part else None
    if not is_dense and (match := re.fullmatch(r"roi_head\.bbox_head\.(\d+)\.(\w+?)((?:\.\d+)?\.(?:weight|bias))", key)):
        part = _ROI.get(match[2])  # of a stage of a cascade
        return f"roi.stages.{match[1]}.{part}{match[3]}" if part else None
    if match := re.fullmatch(r"rpn_head\.rpn_conv\.(?:(\d+)\.conv\.)?(weight|bias)", key):
        return f"rpn.tower.{2 * int(match[1] or 0)}.{match[2]}"
    if match := re.fullmatch(r"rpn_head\.(rpn_cls|rpn_reg)\.(weight|bias)", key):
        return f"rpn.{_RPN[match[1]]}.{match[2]}"
    return None
