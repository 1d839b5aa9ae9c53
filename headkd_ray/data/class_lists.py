"""Check that the splits and the detectors have the same classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headkd_ray.errors import DataError


def ids_of_known(reference: str, known: Sequence[str], who: str, ids: Mapping[str, int]) -> tuple[int | None, ...]:
    """Return the category id of each ``known`` class, matched by name in any order; None where ``ids`` has no such name.

    Args:
        reference: name in messages of what has the ``known`` classes.
        who: name in messages of the split whose class names and ids are in ``ids``.

    Raises:
        DataError: the split has classes that are not among the ``known``.
    """
    if not set(ids) <= set(known):
        raise DataError(
            [f"{who} has {len(ids)} classes, {reference} has {len(known)}; {difference(reference, known, who, list(ids))}"],
            "Class lists disagree; give all splits the same COCO categories:",
        )
    return tuple(ids.get(name) for name in known)


def left_out(reference: str, known: Sequence[str], who: str, names: Sequence[str]) -> list[str]:
    """Return a warning if ``names`` lacks some of the ``known`` classes."""
    missing = [name for name in known if name not in names]
    if not missing:
        return []
    return [
        f"{who} lists {len(known) - len(missing)} of the {len(known)} classes of {reference}; detections of the others do not "
        f"count: {listed(missing)}"
    ]


def difference(reference: str, expected: Sequence[str], who: str, names: Sequence[str]) -> str:
    """Describe which class names only ``reference`` and only ``who`` has."""
    only_reference = [name for name in expected if name not in names]
    only_other = [name for name in names if name not in expected]
    parts = ((reference, only_reference), (who, only_other))
    return "; ".join(f"only in {place}: {listed(found)}" for place, found in parts if found)


def listed(names: Sequence[str], limit: int = 10) -> str:
    """Return the first ``limit`` names, quoted, and how many more there are."""
    more = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
