"""Do the splits speak of the same classes?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from headkd_ray.errors import DataError


def check_same_classes(classes: Mapping[str, Iterable[str]]) -> None:
    """Raise one DataError that shows the difference unless all class lists are equal, in names and order.

    Args:
        classes: who -> class names, for example ``{"data.train": ..., "data.val": ...}``; the first is the reference.
    """
    lists = {who: tuple(names) for who, names in classes.items()}
    (reference, expected), *others = lists.items()
    problems = [
        f"{who} has {len(names)} classes, {reference} has {len(expected)}; {difference(reference, expected, who, names)}"
        for who, names in others
        if names != expected
    ]
    if problems:
        raise DataError(problems, "Class lists disagree; give all splits the same COCO categories:")


def difference(reference: str, expected: Sequence[str], who: str, names: Sequence[str]) -> str:
    """How the class lists of ``reference`` and ``who`` differ, in words."""
    only_reference = [name for name in expected if name not in names]
    only_other = [name for name in names if name not in expected]
    parts = [f"only in {place}: {listed(found)}" for place, found in ((reference, only_reference), (who, only_other)) if found]
    if parts:
        return "; ".join(parts)
    differs = (label for label, (one, other) in enumerate(zip(expected, names, strict=False)) if one != other)
    label = next(differs, min(len(expected), len(names)))
    here, there = (listed(found[label : label + 1]) or "nothing" for found in (expected, names))
    return f"the same names in another order: label {label} is {here} in {reference} and {there} in {who}"


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first ``limit`` names, quoted."""
    more = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
