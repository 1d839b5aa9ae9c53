"""What a check finds: a level, a sentence, figures, the mend, and images that show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from headkd_ray.text import rounded

SplitName = Literal["train", "val"]
Level = Literal["green", "yellow", "red", "skipped"]
LEVELS: tuple[Level, ...] = ("skipped", "green", "yellow", "red")
"""From the mildest to the gravest."""


@dataclass(frozen=True)
class Example:
    """An image of a split that shows what was found, with the boxes that show it."""

    split: SplitName
    row: int
    """Row of the split's index."""
    caption: str
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """x1 y1 x2 y2 in pixels of the stored image."""
    labels: tuple[int, ...] = ()
    """Contiguous label of each box."""
    beside: Example | None = None
    """Another image to be seen beside it, which resembles it."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    """Name of the check."""
    level: Level
    """green = nothing to do; yellow = look at it; red = mend it first; skipped = not looked at."""
    found: str
    """What was found, in words; for a check that was skipped, why."""
    mend: str | None = None
    """What to do about it; None if there is nothing to do."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What was counted and measured, as JSON values."""
    examples: tuple[Example, ...] = ()


def skipped(check: str, why: str) -> Finding:
    """Return the finding of a check that could not be made, or was not asked for."""
    return Finding(check, "skipped", why)


def gravest(levels: Sequence[Level]) -> Level:
    """Return the gravest of several levels."""
    return max(levels, key=LEVELS.index)


def share(part: int, whole: int) -> str:
    """Return ``3 of 120 (2.5 %)``."""
    return f"{part:,} of {whole:,}" + (f" ({rounded(100 * part / whole)} %)" if part and whole else "")
