"""What all figures share. They are drawn with matplotlib; text and axes have one colour, which an HTML page replaces with that
of its text, so that figures are readable in light and dark mode."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from headkd_ray.errors import UserError
from headkd_ray.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, BEST, BASE = "#1d1e20", "#8a8f98", "#ef7d12", "#2f78d8"
"""Colours of text and axes, of what is in the background, of the best, and of what it is compared with."""
NOTHING = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""Metadata of an SVG: none, so that it does not name any address on the network."""
STYLE: Any = {
    **dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"], INK),
    **dict.fromkeys(["axes.spines.top", "axes.spines.right"], False),
    "font.size": 10,
}


def need_matplotlib() -> None:
    """Raise UserError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError('figures need matplotlib: python -m pip install "headkd-ray[report]"') from None


@contextmanager
def drawing() -> Iterator[None]:
    """Draw figures in the block in our style. Raises UserError if matplotlib is not installed."""
    need_matplotlib()
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def axes_of(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a new figure of a size in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure((width, height))
    return figure, figure.subplots()


def literal(name: str) -> str:
    """Return text as matplotlib shows it literally: it takes text between dollar signs for a formula."""
    return printable(name).replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file with a white background."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, facecolor="white", bbox_inches="tight")
    return out.getvalue()


def svg(figure: Figure) -> str:
    """Return the figure as an SVG element with a transparent background, whose text takes the colour of the page's text."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "headkd"}):
        figure.savefig(out, format="svg", transparent=True, bbox_inches="tight", metadata=NOTHING)
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
