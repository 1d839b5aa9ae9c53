"""Find and raise the keys of a detector that limit its number of detections per image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LIMITS = (("postprocess", "max_detections"), ("test_proposals", "post_nms"))


def below(detector: Mapping[str, Any], detections: int) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the keys that allow fewer than ``detections`` per image.

    Args:
        detector: a detector's spec as plain values.
    """
    for name, section in detector.items():
        if not isinstance(section, Mapping):
            continue
        yield from ((name, *path) for path in below(section, detections))
        yield from ((name, key) for owner, key in LIMITS if name == owner and section[key] < detections)


def raised(detector: Mapping[str, Any], detections: int) -> dict[str, Any]:
    """Return the spec with each of those keys raised to at least ``detections``."""
    keys = set(LIMITS)

    def raise_in(name: str, section: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {
            key: raise_in(key, value) if isinstance(value, Mapping) else value for key, value in section.items()
        }
        return values | {key: max(values[key], detections) for key in values if (name, key) in keys}

    return raise_in("", detector)
