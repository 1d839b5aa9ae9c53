"""The findings on the terminal, and as one self-contained HTML page with pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from markupsafe import Markup
from rich.text import Text
from torchvision.transforms.v2.functional import resize

from headkd_ray.checkup.all_checks import CHECKS, file_names
from headkd_ray.checkup.box_statistics import edges
from headkd_ray.checkup.findings import LEVELS, Example, Finding, SplitName
from headkd_ray.checkup.size_findings import MANY
from headkd_ray.checkup.subject import Subject
from headkd_ray.errors import UserError
from headkd_ray.report.draw import TILE, draw, jpeg
from headkd_ray.report.fonts import drawable
from headkd_ray.report.html import cell, document, html, picture
from headkd_ray.report.plots import BASE, BEST, FAINT, axes_of, drawing, literal, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"skipped": "#8a8f98", "green": "#2e9e4f", "yellow": "#c98a00", "red": "#d6362b"}
STYLES = {"skipped": "dim", "green": "green", "yellow": "yellow", "red": "bold red"}
WORDS = {"skipped": "not looked at", "green": "green", "yellow": "yellow", "red": "red"}
LONGEST_SIDE = 512
"""Longer side of a picture in pixels; larger images are shrunk to it."""
MOST_CLASSES = 40
"""Most classes of the figure; the table has all."""


def line_of(finding: Finding) -> Text:
    """Return the line of a finding for the terminal."""
    words, names = (max(map(len, each)) for each in (WORDS.values(), CHECKS))
    head = f"{WORDS[finding.level]:{words}}  {finding.check:{names}}  "
    return Text.assemble((head, STYLES[finding.level]), finding.found)


def mends(findings: Sequence[Finding]) -> Iterator[Text]:
    """Yield what to do about the red and the yellow findings, and how many there are of each level."""
    for level in ("red", "yellow"):
        for each in findings:
            if each.level == level and each.mend is not None:
                yield Text.assemble((f"{each.check}: ", STYLES[level]), each.mend)
    yield Text()
    yield Text(counted(findings))


def counted(findings: Sequence[Finding]) -> str:
    """Return ``1 red, 2 yellow, 12 green, 3 not looked at``."""
    counts = {level: sum(each.level == level for each in findings) for level in reversed(LEVELS)}
    return ", ".join(f"{count} {WORDS[level]}" for level, count in counts.items() if count)


def checkup_page(findings: Sequence[Finding], subject: Subject) -> str:
    """Return the page as HTML. Raises UserError if matplotlib is not installed."""
    rows = [
        html(
            '<tr><td class=text style="color: {}">● {}</td><td class=text>{}</td><td class="text cause">{}</td>'
            '<td class="text cause">{}</td></tr>',
            COLOURS[each.level],
            WORDS[each.level],
            each.check,
            each.found,
            each.mend or "",
        )
        for each in findings
    ]
    data = subject.job.data
    parts = [
        html("<h1>{}</h1>", f"Check-up of {subject.job.run.name}"),
        html("<p class=note>{}</p>", f"{counted(findings)}. Training data: {data.train}; validation data: {data.val}."),
        _table(("level", "check", "what was found", "what to do"), rows, text=4),
    ]
    with drawing():
        for heading, figure in _figures(subject):
            parts.append(html("<h2>{}</h2><figure>{}</figure>", heading, Markup(svg(figure))))
    parts += _class_table(subject)
    names = file_names(findings, subject)
    for each in findings:
        if each.examples:
            parts.append(html("<h2>{}</h2><p class=note>{}</p>", each.check.capitalize(), each.found))
            pictures = Markup().join(_figure(example, subject, names) for example in each.examples)
            parts.append(html('<div style="display: flex; flex-wrap: wrap; gap: 0 1rem">{}</div>', pictures))
    return document(f"Check-up of {subject.job.run.name}", parts)


def _figure(example: Example, subject: Subject, names: Mapping[tuple[str, int], str]) -> Markup:
    """Return the example's picture with its caption, or the caption alone if an image cannot be read any more."""
    shown = [names[each.split, each.row] for each in (example, example.beside) if each is not None]
    caption = f"{example.caption} ({' beside '.join(shown)})"
    try:
        return picture(caption, example_picture(example, subject))
    except (UserError, ValueError) as error:
        return html("<figure><figcaption>{} (no picture: {})</figcaption></figure>", caption, error)


def example_picture(example: Example, subject: Subject) -> bytes:
    """Return an example as a JPEG file: its image with the boxes that it is about, and perhaps another image beside it."""
    tiles = [_drawn(example, subject)]
    if example.beside is not None:
        tiles.append(_drawn(example.beside, subject))
    height = max(tile.shape[1] for tile in tiles)
    padded = [torch.nn.functional.pad(tile, (0, 8, 0, height - tile.shape[1]), value=255) for tile in tiles]
    return jpeg(torch.cat(padded, dim=2)[:, :, :-8])


def _drawn(example: Example, subject: Subject) -> torch.Tensor:
    shards = subject.split(example.split)
    names, _ = drawable(dict(enumerate(shards.meta.classes)))
    pixels = shards.sample_at(example.row).pixels()
    factor = min(1.0, LONGEST_SIDE / max(pixels.shape[-2:]))
    if factor < 1:
        pixels = resize(pixels, [max(1, round(side * factor)) for side in pixels.shape[-2:]], antialias=True)
    boxes = torch.tensor(example.boxes, dtype=torch.float32).reshape(-1, 4) * factor
    return draw(pixels, boxes, torch.tensor(example.labels, dtype=torch.int64), [names[at] for at in example.labels], TILE)


def _figures(subject: Subject) -> list[tuple[str, Figure]]:
    """Return the figures of the data, by heading; none of a split that cannot be read."""
    try:
        splits = subject.splits
    except UserError:
        return []
    found = []
    for heading, plot in {
        "Sizes of boxes in the view": _sides,
        "Aspects of boxes": _aspects,
        "Boxes of an image": _crowds,
        "Boxes of each class": _classes,
    }.items():
        classes = max(len(shards.meta.classes) for shards in splits.values())
        height = 0.9 + 0.22 * min(MOST_CLASSES, classes) if plot is _classes else 2.6
        figure, axes = axes_of(8, height)
        for name in splits:
            try:
                plot(subject, name, BASE if name == "train" else BEST, axes)
            except UserError:
                continue
        if axes.has_data():
            axes.legend(frameon=False, fontsize=8)
            found.append((heading, figure))
    return found


def _sides(subject: Subject, name: SplitName, colour: str, axes: Axes) -> None:
    counts = subject.statistics(name).shown_sides
    _curve(counts, f"{name} (short side {subject.view(name).short_side} px)", colour, axes)
    axes.set(xlabel="shorter side of a box (px)", ylabel="share of boxes")
    if name == "train":
        for side in MANY:
            axes.axvline(side, color=FAINT, lw=0.8, ls=":")


def _aspects(subject: Subject, name: SplitName, colour: str, axes: Axes) -> None:
    _curve(subject.statistics(name).aspects, name, colour, axes)
    axes.set(xlabel="height / width of a box", ylabel="share of boxes")


def _curve(counts: np.ndarray, label: str, colour: str, axes: Axes) -> None:
    places = np.flatnonzero(counts)
    if not len(places):
        return
    where = slice(max(0, places[0] - 1), places[-1] + 2)
    axes.plot(edges()[where], counts[where] / counts.sum(), color=colour, label=label, drawstyle="steps-post")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _crowds(subject: Subject, name: SplitName, colour: str, axes: Axes) -> None:
    boxes = subject.split(name).index.boxes
    most = int(boxes.max(initial=0)) + 1
    counts, at = np.histogram(boxes, bins=min(most, 60), range=(0, most))
    axes.stairs(counts / counts.sum(), at, color=colour, label=name)
    axes.set(xlabel="boxes of an image", ylabel="share of images")


def _classes(subject: Subject, name: SplitName, colour: str, axes: Axes) -> None:
    counts, classes = subject.statistics(name).boxes_of_class, subject.split(name).meta.classes
    reference = subject.statistics("train").boxes_of_class if "train" in subject.splits else counts
    listed = subject.split("train").meta.classes if "train" in subject.splits else classes
    order = np.argsort(reference, kind="stable")[:MOST_CLASSES]  # the rarest
    known = dict(zip(classes, counts.tolist(), strict=True))
    names = [listed[place] for place in order]
    shift, height = (0.2, 0.38) if name == "train" else (-0.2, 0.38)
    at = np.arange(len(names))
    axes.barh(at + shift, [known.get(each, 0) / max(1, counts.sum()) for each in names], height, color=colour, label=name)
    axes.set_yticks(at, [literal(each) for each in names])
    axes.set_xlabel("share of boxes" + (f", the {MOST_CLASSES} rarest classes" if len(listed) > MOST_CLASSES else ""))


def _class_table(subject: Subject) -> list[Markup]:
    """Return a table of boxes and images of each class in each split."""
    columns: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        for name, shards in subject.splits.items():
            found = subject.statistics(name)
            both = zip(found.boxes_of_class.tolist(), found.images_of_class.tolist(), strict=True)
            columns[name] = dict(zip(shards.meta.classes, both, strict=True))
    except UserError:
        return []
    heads = ["class", *(f"{name}: {what}" for name in columns for what in ("boxes", "images"))]
    rows = []
    for each in dict.fromkeys(label for column in columns.values() for label in column):
        counts = [count for column in columns.values() for count in column.get(each, (0, 0))]
        cells = Markup().join(cell(f"{count:,}", count) for count in counts)
        rows.append(html("<tr><td class=text>{}</td>{}</tr>", each, cells))
    return [Markup("<h2>Classes</h2>"), _table(heads, rows, text=1)]


def _table(heads: Sequence[str], rows: Sequence[Markup], text: int) -> Markup:
    """Return a table whose first ``text`` columns hold words."""
    head = Markup().join(
        html("<th{}>{}</th>", Markup(" class=text" if column < text else ""), name) for column, name in enumerate(heads)
    )
    body = Markup("\n").join(rows)
    return html("<div class=scroll><table><thead><tr>{}</tr></thead><tbody>\n{}\n</tbody></table></div>", head, body)
