"""Turn mmdet's tensor names into ours: a detector's ``backbone. neck. head. rpn. roi.``, HEAD's ``assistant. adapters.``"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from headkd_ray.detectors.backbone_names import mmdet_name
from headkd_ray.detectors.conversions.from_mmdet import MMDetConversion
from headkd_ray.detectors.registry import KINDS, Kind


def mmdet_kind(keys: Collection[str]) -> tuple[Kind, MMDetConversion] | None:
    """Return the kind of detector that a state dict's ``keys`` are of, and its conversion; None if it is none of ours."""
    return next(((kind, kind.mmdet) for kind in KINDS if kind.mmdet and kind.mmdet.recognises(keys)), None)


def mmdet_names(keys: Iterable[str]) -> dict[str, str]:
    """Return {mmdet key: our name}; keys that no supported model has are left out."""
    keys = list(keys)
    found = mmdet_kind(keys)
    heads = found[1].names(keys) if found else {}
    normed_neck = any(re.match(r"neck\.lateral_convs\.\d+\.gn\.", key) for key in keys)
    laterals = len({key.split(".")[2] for key in keys if key.startswith("neck.lateral_convs.")})

    def name_of(key: str) -> str | None:
        room, _, rest = key.partition(".")
        if room == "backbone":
            return f"backbone.body.{mmdet_name(rest)}"
        if room == "neck":
            return _neck_name(rest, laterals, normed_neck)
        if match := re.fullmatch(r"_distiller\._adapts\.(\d+)\.(weight|bias)", key):
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
