"""Collect problems, so that all are reported at once and a thousand of the same kind still fit on a screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headkd_ray.errors import DataError

SHOWN = 20


class Problems:
    """A collection of problems by kind, in the order in which they were found."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, kind: str, where: str) -> None:
        """Record one problem.

        Args:
            kind: what is wrong and how to fix it; the same text for all problems of the kind.
            where: file and record, and the offending value.
        """
        self._counts[kind] = self._counts.get(kind, 0) + 1
        listed = self._kinds.setdefault(kind, [])
        if len(listed) < SHOWN:
            listed.append(where)

    def add_all(self, kind: str, rows: Sequence[int], where: Callable[[int], str]) -> None:
        """Record a problem of one kind for each of ``rows``; ``where`` names a row, and is called for those that are listed."""
        if rows:
            listed = self._kinds.setdefault(kind, [])
            listed += [where(row) for row in rows[: max(0, SHOWN - len(listed))]]
            self._counts[kind] = self._counts.get(kind, 0) + len(rows)

    def add_from(self, other: Problems) -> None:
        """Record another collection's problems, too."""
        for kind, places in other._kinds.items():
            listed = self._kinds.setdefault(kind, [])
            listed += places[: max(0, SHOWN - len(listed))]
            self._counts[kind] = self._counts.get(kind, 0) + other._counts[kind]

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def lines(self) -> list[str]:
        """Return one line per problem, at most SHOWN of a kind, then how many more there are."""
        lines = []
        for kind, listed in self._kinds.items():
            lines += [f"{where}: {kind}" for where in listed]
            if self._counts[kind] > len(listed):
                lines.append(f"… and {self._counts[kind] - len(listed)} more ({self._counts[kind]} in all): {kind}")
        return lines

    def check(self, headline: str) -> None:
        """Raise DataError if there are any problems."""
        if self:
            raise DataError(self.lines(), headline=headline)
