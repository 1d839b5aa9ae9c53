"""What a detector gets right and wrong, as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from headkd_ray.diagnosis.curves import Curve
from headkd_ray.diagnosis.detector_diagnosis import Diagnosis
from headkd_ray.diagnosis.error_types import KINDS, SIZES
from headkd_ray.report.console import number
from headkd_ray.report.html import cell, document, html, picture
from headkd_ray.report.plots import BEST, FAINT, axes_of, drawing, literal, svg
from headkd_ray.report.tables import HEADLINE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = 8
"""Classes with a colour of their own in the figures of curves; the others are grey."""
POINTS = 200
"""Most points of a curve that is drawn."""
CELLS = 40
"""Most classes of a confusion matrix that is drawn."""
CONFUSED = 20
"""Most rows in the table of confused classes."""


def detector_page(
    title: str, summary: str, metrics: Mapping[str, Any], diagnosis: Diagnosis, pictures: Sequence[tuple[str, bytes]]
) -> str:
    """Return the page as HTML.

    Args:
        summary: a sentence on the detector and the split.
        metrics: ``CocoMetrics.as_dict()``.
        pictures: caption and JPEG file of each image with mistakes.

    Raises UserError if matplotlib is not installed.
    """
    with drawing():
        sections = detector_sections(metrics, diagnosis, pictures)
    return document(title, [html("<h1>{}</h1>", title), html("<p class=note>{}</p>", summary), *sections])


def detector_sections(metrics: Mapping[str, Any], diagnosis: Diagnosis, pictures: Sequence[tuple[str, bytes]]) -> list[Markup]:
    """Return the page's content without its title; call it within ``drawing``. The arguments are those of ``detector_page``."""
    drawn = {
        "What errors cost": (_errors(diagnosis), _error_table(diagnosis)),
        "Precision and recall": (_precision_recall(diagnosis.curves), None),
        "Which score threshold": (_f1(diagnosis.curves), _class_table(metrics, diagnosis.curves)),
        "Which classes are confused": (_matrix(diagnosis), _confused_table(diagnosis)),
    }
    parts = [_headline(metrics)]
    for heading, (figure, table) in drawn.items():
        if figure is None and table is None:
            continue
        parts.append(html("<h2>{}</h2><p class=note>{}</p>", heading, NOTES[heading]))
        parts += [html("<figure>{}</figure>", Markup(svg(figure)))] if figure else []
        parts += [table] if table else []
    if pictures:
        heading = "Images with most mistakes"
        parts.append(html("<h2>{}</h2><p class=note>{}</p>", heading, NOTES[heading]))
        parts += [picture(caption, content) for caption, content in pictures]
    return parts


NOTES = {
    "What errors cost": "How much AP at IoU 0.5 would rise if one kind of error alone were mended, in the manner of TIDE "
    "(Bolya et al., 2020). The gains do not add up to what is missing. The size is that of the object's box, or of the "
    "detection's where there is nothing: small is less than 32² pixels of the stored image, large is 96² or more.",
    "Precision and recall": "At IoU 0.5, the classes with the lowest AP in colour, the others grey.",
    "Which score threshold": "F1 balances precision and recall; the threshold of a class is where its F1 is highest. The table "
    "has precision and recall there. Click a heading to sort.",
    "Which classes are confused": "Objects (rows) and what was found in their place (columns), at each class's threshold and "
    "IoU 0.5. Colours are shares of a row. The last row is background taken for an object, the last column objects that were "
    "missed.",
    "Images with most mistakes": "Ground truth on the left, detections at each class's threshold on the right.",
}


def _headline(metrics: Mapping[str, Any]) -> Markup:
    head = Markup().join(html("<th>{}</th>", name) for name in HEADLINE)
    row = Markup().join(cell(number(metrics[name]), metrics[name]) for name in HEADLINE)
    return html("<div class=scroll><table><thead><tr>{}</tr></thead><tbody><tr>{}</tr></tbody></table></div>", head, row)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Markup]], text: int) -> Markup:
    """Return a table whose first ``text`` columns hold words."""
    head = Markup().join(
        html("<th{}>{}</th>", Markup(" class=text" if column < text else ""), name) for column, name in enumerate(heads)
    )
    body = Markup("\n").join(html("<tr>{}</tr>", Markup().join(row)) for row in rows)
    return html("<div class=scroll><table><thead><tr>{}</tr></thead><tbody>\n{}\n</tbody></table></div>", head, body)


def _words(text: str) -> Markup:
    return html("<td class=text>{}</td>", text)


def _percent(value: float) -> Markup:
    return cell(number(None if math.isnan(value) else 100 * value), None if math.isnan(value) else value)


def _errors(diagnosis: Diagnosis) -> Figure | None:
    if math.isnan(diagnosis.errors.ap50):
        return None
    figure, axes = axes_of(8, 2.6)
    kinds = list(KINDS)[::-1]
    gains = [100 * np.nan_to_num(diagnosis.errors.gain[kind]) for kind in kinds]  # NaN: there would be nothing left to find
    worst = max(gains)
    axes.barh(kinds, gains, color=[BEST if gain == worst and gain > 0 else FAINT for gain in gains])
    axes.set(xlabel="AP50 gained (points)", xlim=(min(0, *gains), max(1, 1.05 * worst)))
    return figure


def _error_table(diagnosis: Diagnosis) -> Markup:
    errors = diagnosis.errors
    rows = [
        [
            *(_words(kind), _words(meaning), _percent(errors.gain[kind])),
            *(cell(str(count), count) for count in (errors.count[kind], *errors.by_size[kind].values())),
        ]
        for kind, meaning in KINDS.items()
    ]
    return _table(("error", "what it means", "AP50 gained", "times", *SIZES), rows, text=2)


def _precision_recall(curves: Sequence[Curve]) -> Figure | None:
    return _lines(
        [each for each in curves if each.objects and len(each.score)],
        lambda each: (each.recall, np.maximum.accumulate(each.precision[::-1])[::-1]),
        "recall",
        "precision",
    )


def _f1(curves: Sequence[Curve]) -> Figure | None:
    return _lines(
        [each for each in curves if each.best is not None], lambda each: (each.score, each.f1), "score threshold", "F1"
    )


def _lines(curves: Sequence[Curve], points: Any, across: str, up: str) -> Figure | None:
    if not curves:
        return None
    figure, axes = axes_of(8, 4)
    worst = sorted(curves, key=lambda each: each.ap50)[:LINES]

    def drawn(each: Curve) -> list[np.ndarray]:
        across, up = points(each)
        chosen = np.unique(np.linspace(0, len(across) - 1, POINTS).astype(int))
        return [across[chosen], up[chosen]]

    for each in curves:
        if each not in worst:
            axes.plot(*drawn(each), color=FAINT, lw=0.8, alpha=0.5)
    for each in worst:
        axes.plot(*drawn(each), lw=1.6, label=f"{literal(each.name)} ({100 * each.ap50:.0f})")
    axes.set(xlabel=across, ylabel=up, xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(title="class (AP50)", fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def _class_table(metrics: Mapping[str, Any], curves: Sequence[Curve]) -> Markup:
    rows = []
    for each in curves:
        ap, at = metrics["per_class"][each.name], each.best
        figures = [
            _percent(float(values[at])) if at is not None else cell("–", None) for values in (each.precision, each.recall)
        ]
        threshold = cell("–" if each.threshold is None else f"{each.threshold:.3f}", each.threshold)
        objects = cell(str(each.objects), each.objects)
        rows.append([_words(each.name), objects, cell(number(ap), ap), _percent(each.ap50), threshold, *figures])
    return _table(("class", "objects", "AP", "AP50", "threshold", "precision", "recall"), rows, text=1)


def _matrix(diagnosis: Diagnosis) -> Figure | None:
    counts = diagnosis.confusion
    if not 1 < len(counts) <= CELLS + 1 or not counts.any():
        return None
    names = [*(literal(each.name) for each in diagnosis.curves), "background"]
    side = 2.5 + 0.28 * len(names)
    figure, axes = axes_of(side, side)
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(counts / totals, cmap="Oranges", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), [*names[:-1], "missed"], rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="found", ylabel="true")
    for row, column in zip(*np.nonzero(counts), strict=True):
        share = counts[row, column] / totals[row, 0]
        colour = "white" if share > 0.6 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=6)
    return figure


def _confused_table(diagnosis: Diagnosis) -> Markup | None:
    rows = [[_words(one), _words(other), cell(str(count), count)] for one, other, count in diagnosis.confused(CONFUSED)]
    return _table(("true class", "found as", "times"), rows, text=2) if rows else None
