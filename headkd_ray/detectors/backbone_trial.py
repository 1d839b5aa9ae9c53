"""Problems of a backbone that only a trial run finds: view sizes that it cannot take, and values that timm never reads.

Trials run on torch's meta device, which tracks shapes without computing anything: they take milliseconds and no memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from headkd_ray.detectors.backbone import Backbone, shapes_of
from headkd_ray.job import BackboneSpec

Size = tuple[int, int]
"""Height and width of a view in pixels, padding included."""


def backbone_problems(spec: BackboneSpec, sizes: Sequence[Size], changeable: bool = True) -> list[str]:
    """List the problems of a backbone that timm can build, each with the key to mend (``backbone....`` or ``data.pad``).

    Args:
        sizes: sizes of the views to try.
        changeable: whether the backbone's own keys can be changed; those of a trained detector cannot.
    """
    problems = _unread(spec)
    if problems:
        return problems
    found = _failure(spec, {}, sizes)
    if found is None:
        return []
    (height, width), reason = found
    key, remedy = _remedy(spec, sizes, changeable)
    return [f"{key}: {spec.name} cannot take views of {height} x {width} px ({reason}); {remedy}"]


def _unread(spec: BackboneSpec) -> list[str]:
    """List the problems of list arguments of which timm reads only the first values and silently ignores the rest."""
    problems = []
    lists = {name: value for name, value in spec.kwargs.items() if isinstance(value, list | tuple)}
    whole = shapes_of(spec, spec.kwargs) if lists else None
    for name, value in lists.items():
        read = len(value)
        while read > 1 and shapes_of(spec, {**spec.kwargs, name: value[: read - 1]}) == whole:
            read -= 1
        if read < len(value):
            problems.append(f"backbone.kwargs.{name}: {spec.name} reads {read} of these {len(value)} values; remove the others")
    return problems


def _failure(spec: BackboneSpec, extra: Mapping[str, Any], sizes: Iterable[Size]) -> tuple[Size, str] | None:
    """Return the first of ``sizes`` that the backbone with the ``extra`` arguments cannot take, and why."""
    plain = spec.replace({"weights": "none", "kwargs": {**spec.kwargs, **extra}})
    try:
        with torch.device("meta"):
            net = Backbone(plain).eval()
    except Exception as error:  # timm's models raise anything
        return next(iter(sizes)), _first_line(error)
    for size in sizes:
        try:
            with torch.no_grad():
                net(torch.empty(1, 3, *size, device="meta"))
        except Exception as error:
            return size, _first_line(error)
    return None


def _remedy(spec: BackboneSpec, sizes: Sequence[Size], changeable: bool) -> tuple[str, str]:
    """Return the key to blame and what to do about it; remedies that name a value have been tried."""
    for extra, pad in _changes(max(map(max, sizes))):
        if (changeable or not extra) and _failure(spec, extra, _padded(sizes, pad)) is None:
            keys = [f"student.backbone.kwargs.{name}: {json.dumps(value)}" for name, value in extra.items()]
            return "backbone.name", f"set {' and '.join(keys + ([f'data.pad: {pad}'] if pad > 1 else []))}"
    if not changeable:
        return "backbone.name", "use a teacher with another backbone"
    for name in spec.kwargs:
        others = {other: value for other, value in spec.kwargs.items() if other != name}
        if _failure(spec.replace({"kwargs": others}), {}, sizes) is None:
            return f"backbone.kwargs.{name}", "give another value or remove it"
    return "backbone.name", "choose another backbone, for example resnet50 or convnext_tiny, which take any size"


def _changes(longest: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (arguments, padding) that may help, the cheapest in training first; the last ones give all views one size."""
    yield {"strict_img_size": False}, 1
    yield from (({}, pad) for pad in (64, 128, 256))
    for side in (-(-longest // window) * window for window in (32, 224, 256)):
        yield {}, side
        yield {"img_size": [side, side]}, side


def _padded(sizes: Iterable[Size], pad: int) -> list[Size]:
    return [(-(-height // pad) * pad, -(-width // pad) * pad) for height, width in sizes]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
