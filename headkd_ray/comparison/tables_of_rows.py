"""The comparison as rich tables, Markdown and one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from headkd_ray.comparison.figures_of_rows import METRICS, RowFigures
from headkd_ray.comparison.run_rows import Row
from headkd_ray.comparison.spread import Spread
from headkd_ray.report.html import cell, document, html, picture
from headkd_ray.report.plots import FAINT, axes_of, drawing, literal, svg
from headkd_ray.text import rounded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_METRICS = tuple(name for name in METRICS if name != "AP75")


def cells_of(figures: RowFigures) -> list[tuple[str, float | None]]:
    """Return the text of each cell of a row, after its name, and the value that it is sorted by."""
    gain, between = "", ""
    if figures.gain is not None:
        gain = f"{figures.gain:+}"
    if figures.interval is not None:
        between = f"{figures.interval[0]:+.1f} to {figures.interval[1]:+.1f}"
    return [
        (str(len(figures.seeds)), len(figures.seeds)),
        (str(figures.metrics["AP"]), _known(figures.metrics["AP"])),
        (gain, None if figures.gain is None else figures.gain.mean),
        (between, None if figures.interval is None else figures.interval[0]),
        *((str(figures.metrics[name]), _known(figures.metrics[name])) for name in SHOWN_METRICS[1:]),
        ("–" if math.isnan(figures.hours.mean) else rounded(figures.hours.mean), _known(figures.hours)),
    ]


HEADS = ("row", "seeds", "AP", "gain", "95 % interval", *SHOWN_METRICS[1:], "hours")


def rich_table(rows: Sequence[RowFigures], reference: str) -> Table:
    """Return the table for the terminal, without AP by IoU and size, which the files have."""
    table = Table(title=f"COCO box AP (%), gains over {reference}")
    shown = [column for column, head in enumerate(HEADS) if head not in METRICS[1:]]
    for column in shown:
        table.add_column(HEADS[column], justify="right" if column else "left", no_wrap=bool(column), overflow="fold")
    for figures in rows:
        texts = [figures.name, *(text for text, _ in cells_of(figures))]
        table.add_row(*(Text(texts[column]) for column in shown))
    return table


def markdown(rows: Sequence[RowFigures], summary: str, notes: Sequence[str]) -> str:
    """Return the comparison as a Markdown document."""
    lines = [summary, "", f"| {' | '.join(HEADS)} |", f"| --- |{' ---: |' * (len(HEADS) - 1)}"]
    lines += [f"| {' | '.join([_plain(figures.name), *(text for text, _ in cells_of(figures))])} |" for figures in rows]
    lines += ["", f"| class | {' | '.join(_plain(figures.name) for figures in rows)} |", f"| --- |{' ---: |' * len(rows)}"]
    for name in rows[0].per_class:
        lines.append(f"| {_plain(name)} | {' | '.join(str(figures.per_class[name]) for figures in rows)} |")
    return "\n".join([*lines, "", *(f"- {_plain(note)}" for note in notes)]).rstrip() + "\n"


def page(
    rows: Sequence[tuple[Row, RowFigures]], summary: str, notes: Sequence[str], pictures: Sequence[tuple[str, bytes]]
) -> str:
    """Return the comparison as an HTML page.

    Args:
        pictures: caption and JPEG file of each image.

    Raises UserError if matplotlib is not installed.
    """
    figures = [each for _, each in rows]
    with drawing():
        drawn = _curves([row for row, _ in rows])
        parts = [html("<h1>{}</h1><p class=note>{}</p>", "Comparison", summary)]
        parts.append(_table(HEADS, [(each.name, cells_of(each)) for each in figures]))
        parts += [html("<p class=note>{}</p>", note) for note in notes]
        if drawn is not None:
            parts.append(html("<h2>Validation AP</h2><figure>{}</figure>", Markup(svg(drawn))))
    classes = [
        (name, [(str(each.per_class[name]), _known(each.per_class[name])) for each in figures]) for name in figures[0].per_class
    ]
    parts += [Markup("<h2>AP by class</h2>"), _table(("class", *(each.name for each in figures)), classes)]
    if pictures:
        parts.append(Markup("<h2>Images on which they disagree most</h2>"))
    parts += [picture(caption, content) for caption, content in pictures]
    return document("Comparison", parts)


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, float | None]]]]) -> Markup:
    head = Markup().join(
        html("<th{}>{}</th>", Markup("" if number else " class=text"), name) for number, name in enumerate(heads)
    )
    body = Markup("\n").join(
        html("<tr><td class=text>{}</td>{}</tr>", name, Markup().join(cell(*each) for each in cells)) for name, cells in rows
    )
    return html("<div class=scroll><table><thead><tr>{}</tr></thead><tbody>\n{}\n</tbody></table></div>", head, body)


def _curves(rows: Sequence[Row]) -> Figure | None:
    if not any(run.curve for row in rows for run in row.runs.values()):
        return None
    figure, axes = axes_of(8, 3.6)
    for number, row in enumerate(rows):
        points: Mapping[float, list[float]] = {}
        for run in row.runs.values():
            axes.plot(*zip(*run.curve, strict=True), color=f"C{number}", lw=0.6, alpha=0.4) if run.curve else None
            points = {**points, **{epoch: [*points.get(epoch, []), ap] for epoch, ap in run.curve}}
        means = sorted((epoch, sum(values) / len(values)) for epoch, values in points.items())
        if means:
            axes.plot(*zip(*means, strict=True), color=f"C{number}", marker=".", lw=1.8, label=literal(row.name))
    axes.set(xlabel="epoch", ylabel="AP on data.val (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.grid(color=FAINT, alpha=0.2)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _known(figure: Spread) -> float | None:
    return None if math.isnan(figure.mean) else figure.mean


def _plain(text: str) -> str:
    """Return text as one Markdown table cell shows it."""
    for mark in "\\`*_|<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
