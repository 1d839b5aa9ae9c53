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


def outputs_by_name(who: str, known: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Describe what becomes of the outputs of a detector with the ``known`` classes when they follow the data's ``classes``.

    ``who`` is its name in messages: the teacher, the checkpoint.
    """
    fresh, unused = [n for n in classes if n not in known], [n for n in known if n not in classes]
    alike = differing_in_case(who, known, classes)
    return [
        *([f"new weights for classes that {who} does not know: {listed(fresh, 100)}"] if fresh else []),
        *([f"warning: not matched because the letter case differs: {', '.join(alike)}"] if alike else []),
        *([f"left out because the data does not have them: {listed(unused)}"] if unused else []),
    ]


def check_common(who: str, known: Sequence[str], data: str, classes: Sequence[str], key: str) -> None:
    """Raise DataError if a detector with the ``known`` classes knows none of the data's ``classes``.

    ``who`` and ``data`` are their names in the message, and ``key`` is the job key that can name the detector's outputs.
    """
    if set(known) & set(classes):
        return
    alike = differing_in_case("the detector", known, classes)
    case = f"; only the letter case differs for {', '.join(alike)}" if alike else ""
    raise DataError(
        f"{who} has {len(known)} classes, {data} has {len(classes)}; {difference(data, classes, who, known)}{case}; it must "
        f"know at least one class of the data ({key} can name its outputs otherwise)"
    )


def differing_in_case(who: str, known: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Describe each of ``classes`` that is not among the ``known`` ones of ``who``, but would be in another letter case."""
    spelled = {name.casefold(): name for name in known if name not in classes}
    fresh = [name for name in classes if name not in known and name.casefold() in spelled]
    return [f"{name!r} ({who}'s {spelled[name.casefold()]!r})" for name in fresh]


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
