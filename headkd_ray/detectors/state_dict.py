"""The state dict in a weight file's content, however it is wrapped and prefixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from headkd_ray.errors import CheckpointError

State = dict[str, Tensor]
_USUAL = ("state_dict", "model", "")
"""Where it stands in files of mmdet, mmcls and Lightning; of torchvision's reference scripts; in the content itself."""


def find_state_dict(content: Mapping[str, Any], source: str, is_known: Callable[[Mapping[str, Tensor]], bool]) -> State:
    """The tensors by name that ``is_known`` recognises in a file's ``content``; those in the likeliest place if it does none.

    They may be the content itself or one mapping in it, and all their names may share prefixes (``module.``, ``_orig_mod.``,
    ``model.``, ``student.``, ...), which are then taken off.

    Raises CheckpointError if there are no tensors, or if several mappings are recognised and none is in a usual place.
    """
    parts = _parts(content)
    if not parts:
        raise CheckpointError(f"{source}: {_without_state(content)}")
    known = {key: state for key, tensors in parts.items() for state in list(filter(is_known, _unprefixed(tensors)))[:1]}
    if not known:
        return next(iter(parts.values()))
    for key in _USUAL:
        if key in known:
            return known[key]
    if len(known) > 1:
        raise CheckpointError(f"{source}: holds several models ({', '.join(known)}); save the one that you mean by itself")
    return next(iter(known.values()))


def meta_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """mmdet's ``meta`` beside the tensors; empty if there is none."""
    meta = content.get("meta")
    return dict(meta) if isinstance(meta, Mapping) else {}


def _parts(content: Mapping[str, Any]) -> dict[str, State]:
    """What holds tensors, by its key (empty = the content itself), the usual places first."""
    mappings = {"": content} | {str(key): part for key, part in content.items() if isinstance(part, Mapping)}
    tensors = {
        key: {str(name): value for name, value in part.items() if isinstance(value, Tensor)} for key, part in mappings.items()
    }
    order = [*(key for key in _USUAL if key in tensors), *(key for key in tensors if key not in _USUAL)]
    return {key: tensors[key] for key in order if tensors[key]}


def _unprefixed(state: State) -> Iterator[State]:
    """``state``, then without the first, the first two, ... parts that all its names share."""
    yield state
    while all("." in name for name in state) and len({name.partition(".")[0] for name in state}) == 1:
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
        yield state


def _without_state(content: Mapping[str, Any]) -> str:
    """Why ``content`` has no state dict: where its tensors are instead, or that it has none."""
    places: dict[type, str] = {}
    _look(content, "", places)
    if Tensor in places:
        return f"holds no state dict; its tensors are under {places[Tensor]}; save it with torch.save(model.state_dict(), ...)"
    if np.ndarray in places:
        return f"holds NumPy arrays ({places[np.ndarray]}, ...), not tensors; save it with torch.save(model.state_dict(), ...)"
    return f"holds no tensors; its keys are {', '.join(map(str, list(content)[:5])) or 'none'}"


def _look(value: object, place: str, places: dict[type, str], depth: int = 0) -> None:
    """Put the first place of a tensor and of an array in ``value`` into ``places``."""
    for kind in (Tensor, np.ndarray):
        if isinstance(value, kind):
            places.setdefault(kind, place)
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in inside if depth < 8 else ():
        _look(inner, f"{place}.{key}" if place else str(key), places, depth + 1)
