"""The terminal: a rich console for text that may come from files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

from headkd_ray.text import printable

Item = TypeVar("Item")


class Terminal(Console):
    """A console that prints text literally: no markup, no highlighting, and control characters escaped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "highlight": False, "emoji": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of anything that is printed, including tables and progress bars, made printable."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)


def progress_bar() -> Progress:
    """Return a progress bar on standard error that leaves nothing behind; where that is no terminal, it prints nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Terminal(stderr=True), transient=True, disable=not sys.stderr.isatty())


def tracked(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Yield ``items``, of which there are ``total``, and show how far they are."""
    with progress_bar() as bar:
        yield from bar.track(items, total=total, description=what)
