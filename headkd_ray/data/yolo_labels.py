"""Read the lines of YOLO label files: a class number and a box, polygon or pose, in fractions of the image's sides."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from headkd_ray.data.box_checks import shortly
from headkd_ray.data.problems import Problems

Box = tuple[float, float, float, float]

BOX = 5
"""Columns of a line with a box: class, centre x, centre y, width, height."""
TEXT = "not a text file in UTF-8; write the labels again"
COMMAS = "columns are separated by spaces and decimals by a point: write 0 0.5 0.5 0.2 0.1"
NUMBERS = "a line must hold finite numbers: class, centre x, centre y, width, height"
COLUMNS = "a line must have 5 columns (class and box), 6 (and a confidence), 7, 9, 11 … (class and polygon) or those of a pose"
CLASS = "class number without a name; correct it, or add its name to 'names' (the first class is 0)"

POLYGON = "a polygon (a segment or an oriented box), of which the upright box around it is used"
POSE = "a pose, of which the box is used"
SCORE = "a confidence, as predictions have; they are trained on as if they were certain"
TWICE = "the same as another line of their file, and left out"


class Labels:
    """Reads label files one by one; counts what the user should know about, and records problems."""

    def __init__(self, classes: int, keypoints: int | None, problems: Problems) -> None:
        """``keypoints``: number of columns after the box that a pose has, as data.yaml says; None = it does not."""
        self._classes, self._keypoints, self._problems = classes, keypoints, problems
        self._told = Counter[str]()
        self._lines = 0

    def read(self, content: bytes, where: str) -> Iterator[tuple[int, int, Box]]:
        """Yield (number of the line, class, box) of each object; the box is x, y of the left upper corner, width, height.

        Args:
            content: the file's bytes.
            where: the file's name, for messages.
        """
        try:
            lines = content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            self._problems.add(TEXT, f"{where}, {error}")
            return
        seen: set[tuple[float, ...]] = set()
        for number, line in enumerate(lines, start=1):
            values = self._values(line, f"{where}: line {number}")
            if not values:
                continue
            self._lines += 1
            if values in seen:
                self._told[TWICE] += 1
                continue
            seen.add(values)
            box = self._box(values)
            if box is None:
                self._problems.add(COLUMNS, f"{where}: line {number}, {len(values)} columns")
            elif values[0] not in range(self._classes):
                self._problems.add(CLASS, f"{where}: line {number}, class {values[0]:g}")
            else:
                yield number, int(values[0]), box

    def warnings(self) -> list[str]:
        """Return what the user should know about the lines, one sentence each."""
        of = f"of {self._lines} lines"
        hold = {kind: "are" if kind is TWICE else "hold" for kind in self._told}
        return [f"{count} {of} {hold[kind]} {kind}" for kind, count in self._told.items()]

    def _values(self, line: str, where: str) -> tuple[float, ...]:
        """Return a line's numbers; an empty tuple if it has none, or a problem."""
        try:
            values = tuple(map(float, line.split()))
        except ValueError:
            values = (math.nan,)
        if all(map(math.isfinite, values)):
            return values
        self._problems.add(COMMAS if "," in line and _numbers(line) else NUMBERS, f"{where}, {shortly(line.strip())}")
        return ()

    def _box(self, values: tuple[float, ...]) -> Box | None:
        """Return the box of a line; None if its columns have no meaning."""
        count, rest = len(values), values[BOX:]
        if count == BOX:
            return _around_centre(values[1:])
        if self._is_pose(rest):
            self._told[POSE] += 1
            return _around_centre(values[1:BOX])
        if count == BOX + 1 and 0 <= rest[0] <= 1:
            self._told[SCORE] += 1
            return _around_centre(values[1:BOX])
        if count < 7 or count % 2 == 0:
            return None
        self._told[POLYGON] += 1
        x, y = values[1::2], values[2::2]
        return min(x), min(y), max(x) - min(x), max(y) - min(y)

    def _is_pose(self, rest: tuple[float, ...]) -> bool:
        """Return whether the columns after the box are key points: as many as data.yaml says, or each with a visibility."""
        if self._keypoints is not None:
            return len(rest) == self._keypoints
        # With an even number of columns it is no polygon. An odd number could be one, but its numbers are hardly 0, 1 or 2.
        return len(rest) >= 3 and len(rest) % 3 == 0 and all(value in (0, 1, 2) for value in rest[2::3])


def _around_centre(numbers: tuple[float, ...]) -> Box:
    x, y, width, height = numbers
    return x - width / 2, y - height / 2, width, height


def _numbers(line: str) -> bool:
    """Return whether the line would hold numbers if commas were points or spaces."""
    return all(character in "0123456789+-.,eE; \t" for character in line.strip())
