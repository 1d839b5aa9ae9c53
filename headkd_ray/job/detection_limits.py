"""Which keys of a detector limit how many detections an image can have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LIMITS = (("postprocess", "max_detections"), ("test_proposals", "post_nms"))


def below(detector: Mapping[str, Any], detections: int) -> Iterator[tuple[str, ...]]:
    """Paths of the keys that allow fewer than ``detections`` an image.

    Args:
        detector: a detector's spec as plain values.
    """
    for name, section in detector.items():
        if not isinstance(section, Mapping):
            continue
        yield from ((name, *path) for path in below(section, detections))
        yield from ((name, key) for owner, key in LIMITS if name == owner and section[key] < detections)


def raised(detector: Mapping[str, Any], detections: int) -> dict[str, Any]:
    """The spec with at least ``detections`` in each of those keys."""
    keys = set(LIMITS)

    def raise_in(name: str, section: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {
            key: raise_in(key, value) if isinstance(value, Mapping) else value for key, value in section.items()
        }
        return values | {key: max(values[key], detections) for key in values if (name, key) in keys}

    return raise_in("", detector)
