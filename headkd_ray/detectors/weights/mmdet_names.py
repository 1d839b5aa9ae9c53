"""Turn mmdet's tensor names into ours: a detector's ``backbone. neck. head. rpn. roi.``, HEAD's ``assistants. adapters.``"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from headkd_ray.detectors.backbone_names import mmdet_name
from headkd_ray.detectors.conversions.from_mmdet import DenseFromMMDet, MMDetConversion
from headkd_ray.detectors.registry import KINDS, Kind

_EXTRA_HEAD = re.compile(r"(?:bbox|rpn)_head\._extra_heads\.(\w+)\.(.+)")
"""A dense assistant of the research branch's students, with the name that their config gives it."""
_CASCADE = re.compile(r"(cascade)_roi_head\.(.+)")
"""The assistant of the research branch's Faster R-CNN students."""
_ADAPTER = re.compile(r"_distiller\._adapts\.(\d+)\.(?:_adapt\.)?(?:_layer\.)?(weight|bias)")


class MMDetAssistant(NamedTuple):
    """An assistant in a state dict of HEAD's students."""

    conversion: MMDetConversion
    """The conversion of the kind of detector that has such a head."""
    names: dict[str, str]
    """{mmdet key: our name of the tensor, as in that kind of detector}."""


def mmdet_assistants(keys: Iterable[str]) -> dict[str, MMDetAssistant]:
    """Return the assistants in a state dict of HEAD's students, by their official names; a dense student's RoI head is rcnn."""
    keys = list(keys)
    student = mmdet_kind(keys)
    is_dense = student is not None and isinstance(student[1], DenseFromMMDet)
    alone: dict[str, dict[str, str]] = {}  # the keys of each as a detector with that head alone has them
    for key in keys:
        if match := _EXTRA_HEAD.fullmatch(key):
            alone.setdefault(match[1], {})[key] = f"bbox_head.{match[2]}"
        elif match := _CASCADE.fullmatch(key):
            alone.setdefault(match[1], {})[key] = f"roi_head.{match[2]}"
        elif is_dense and key.startswith("roi_head."):
            alone.setdefault("rcnn", {})[key] = key
    found = {}
    for name, own in alone.items():
        # Files are recognised as two-stage by their RPN, which an assistant lacks.
        kind = mmdet_kind(own.values()) or mmdet_kind([*own.values(), "rpn_head.rpn_cls.weight"])
        if kind is not None:
            names = kind[1].names(own.values())
            found[name] = MMDetAssistant(kind[1], {key: names[as_if] for key, as_if in own.items() if as_if in names})
    return found


def mmdet_kind(keys: Collection[str]) -> tuple[Kind, MMDetConversion] | None:
    """Return the kind of detector that a state dict's ``keys`` are of, and its conversion; None if it is none of ours."""
    return next(((kind, kind.mmdet) for kind in KINDS if kind.mmdet and kind.mmdet.recognises(keys)), None)


def mmdet_names(keys: Iterable[str]) -> dict[str, str]:
    """Return {mmdet key: our name}; keys that no supported model has are left out."""
    keys = list(keys)
    found = mmdet_kind(keys)
    heads = found[1].names(keys) if found else {}
    for assistant, (_, names) in mmdet_assistants(keys).items():
        heads |= {key: f"assistants.{assistant}.{name.partition('.')[2]}" for key, name in names.items()}
    normed_neck = any(re.match(r"neck\.lateral_convs\.\d+\.gn\.", key) for key in keys)
    laterals = len({key.split(".")[2] for key in keys if key.startswith("neck.lateral_convs.")})

    def name_of(key: str) -> str | None:
        room, _, rest = key.partition(".")
        if room == "backbone":
            return f"backbone.body.{mmdet_name(rest)}"
        if room == "neck":
            return _neck_name(rest, laterals, normed_neck)
        if match := _ADAPTER.fullmatch(key):
            return f"adapters.{match[1]}.{match[2]}"
        return heads.get(key)

    return {key: name for key in keys if (name := name_of(key)) is not None}


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
