"""Do the splits, and whoever detects, speak of the same classes?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headkd_ray.errors import DataError


def ids_of_known(reference: str, known: Sequence[str], who: str, ids: Mapping[str, int]) -> tuple[int | None, ...]:
    """Category id of each of the ``known`` classes by its name, whatever the order; None where ``ids`` has no such name.

    Args:
        reference: how messages call whoever knows the classes.
        who: how they call the split whose class names and ids ``ids`` are.

    Raises:
        DataError: the split has other classes, too.
    """
    if not set(ids) <= set(known):
        raise DataError(
            [f"{who} has {len(ids)} classes, {reference} has {len(known)}; {difference(reference, known, who, list(ids))}"],
            "Class lists disagree; give all splits the same COCO categories:",
        )
    return tuple(ids.get(name) for name in known)


def left_out(reference: str, known: Sequence[str], who: str, names: Sequence[str]) -> list[str]:
    """A warning if ``names`` lacks some of the ``known`` classes."""
    missing = [name for name in known if name not in names]
    if not missing:
        return []
    return [
        f"{who} lists {len(known) - len(missing)} of the {len(known)} classes of {reference}; detections of the others do not "
        f"count: {listed(missing)}"
    ]


def difference(reference: str, expected: Sequence[str], who: str, names: Sequence[str]) -> str:
    """Which class names only ``reference`` and only ``who`` has, in words."""
    only_reference = [name for name in expected if name not in names]
    only_other = [name for name in names if name not in expected]
    parts = ((reference, only_reference), (who, only_other))
    return "; ".join(f"only in {place}: {listed(found)}" for place, found in parts if found)


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first ``limit`` names, quoted."""
    more = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
