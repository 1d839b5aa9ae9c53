"""Turn torchvision's tensor names into ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from headkd_ray.detectors.conversions.from_torchvision import TorchvisionConversion
from headkd_ray.detectors.registry import KINDS, Kind


def torchvision_kind(keys: Collection[str]) -> tuple[Kind, TorchvisionConversion] | None:
    """Return the kind of detector that a state dict's ``keys`` are of, and its conversion; None if it is none of ours."""
    return next(((kind, kind.torchvision) for kind in KINDS if kind.torchvision and kind.torchvision.recognises(keys)), None)


def torchvision_names(keys: Iterable[str]) -> dict[str, str]:
    """Return {torchvision key: our name}; keys that no supported model has are left out."""
    keys = list(keys)
    found = torchvision_kind(keys)
    normed_neck = "backbone.fpn.inner_blocks.0.1.weight" in keys

    def name_of(key: str) -> str | None:
        if key.startswith("backbone.body."):
            return key
        if key.startswith("backbone.fpn."):
            return _neck_name(key.removeprefix("backbone.fpn."), normed_neck)
        return found[1].name(key) if found else None

    return {key: name for key in keys if (name := name_of(key)) is not None}


def _neck_name(rest: str, is_normed: bool) -> str | None:
    # Before torchvision 0.13 the convs stood by themselves, without a 0.
    place = r"(\d+\.[01])\.(\w+)" if is_normed else r"(\d+)(?:\.0)?\.(weight|bias)"
    if match := re.fullmatch(rf"(inner|layer)_blocks\.{place}", rest):
        return f"neck.{'lateral' if match[1] == 'inner' else 'output'}.{match[2]}.{match[3]}"
    if not is_normed and (match := re.fullmatch(r"extra_blocks\.p([67])\.(weight|bias)", rest)):
        return f"neck.extra.{int(match[1]) - 6}.{match[2]}"
    return None
