"""State dicts: finding one in a weight file's content, however it is wrapped and prefixed, and hashing one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from headkd_ray.errors import CheckpointError

if TYPE_CHECKING:
    from hashlib import _Hash as Digest

State = dict[str, Tensor]
_USUAL = ("state_dict", "model", "")
"""Its usual keys: in files of mmdet, mmcls and Lightning; of torchvision's reference scripts; empty = the content itself."""


def find_state_dict(content: Mapping[str, Any], source: str, is_known: Callable[[Mapping[str, Tensor]], bool]) -> State:
    """Find the tensors by name that ``is_known`` recognises in a file's ``content``.

    They may be the content itself or one mapping in it, and all their names may share prefixes (``module.``, ``_orig_mod.``,
    ``model.``, ``student.``, ...), which are then removed. If nothing is recognised, the tensors in the most usual place are
    returned.

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
    """Return mmdet's ``meta`` beside the tensors, or an empty dict if there is none."""
    meta = content.get("meta")
    return dict(meta) if isinstance(meta, Mapping) else {}


def add_to_digest(digest: Digest, state: Mapping[str, Tensor]) -> None:
    """Let ``digest``, one of hashlib's, take in the tensors: names, shapes, types and values."""
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors, in hexadecimal."""
    found = hashlib.sha256()
    add_to_digest(found, state)
    return found.hexdigest()


def _parts(content: Mapping[str, Any]) -> dict[str, State]:
    """Return all mappings that hold tensors, by key (empty = the content itself), the usual places first."""
    mappings = {"": content} | {str(key): part for key, part in content.items() if isinstance(part, Mapping)}
    tensors = {
        key: {str(name): value for name, value in part.items() if isinstance(value, Tensor)} for key, part in mappings.items()
    }
    order = [*(key for key in _USUAL if key in tensors), *(key for key in tensors if key not in _USUAL)]
    return {key: tensors[key] for key in order if tensors[key]}


def _unprefixed(state: State) -> Iterator[State]:
    """Yield ``state``, then ``state`` without the first, the first two, ... prefixes that all its names share."""
    yield state
    while all("." in name for name in state) and len({name.partition(".")[0] for name in state}) == 1:
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
        yield state


def _without_state(content: Mapping[str, Any]) -> str:
    """Explain why ``content`` has no state dict: where its tensors are instead, or that it has none."""
    places: dict[type, str] = {}
    _look(content, "", places)
    if Tensor in places:
        return f"holds no state dict; its tensors are under {places[Tensor]}; save it with torch.save(model.state_dict(), ...)"
    if np.ndarray in places:
        return f"holds NumPy arrays ({places[np.ndarray]}, ...), not tensors; save it with torch.save(model.state_dict(), ...)"
    return f"holds no tensors; its keys are {', '.join(map(str, list(content)[:5])) or 'none'}"


def _look(value: object, place: str, places: dict[type, str], depth: int = 0) -> None:
    """Record in ``places`` where in ``value`` the first tensor and the first array are."""
    for kind in (Tensor, np.ndarray):
        if isinstance(value, kind):
            places.setdefault(kind, place)
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in inside if depth < 8 else ():
        _look(inner, f"{place}.{key}" if place else str(key), places, depth + 1)
