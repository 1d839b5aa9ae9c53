"""A run, as one self-contained HTML page: its curves, what its student gets right and wrong, pictures, and its job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from headkd_ray.diagnosis.detector_diagnosis import Diagnosis
from headkd_ray.report.console import number
from headkd_ray.report.detector_page import detector_sections
from headkd_ray.report.html import document, html, picture
from headkd_ray.report.plots import BASE, BEST, FAINT, INK, axes_of, drawing, literal, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 400
"""Most points of a curve; of more records, neighbouring ones are averaged."""
WIDE = 20
"""Ratio of losses above which their axis is logarithmic."""
SHOWN_NOTES = 50
"""Most notes of the log that are shown, the last ones."""
METRICS = {"AP": BEST, "AP50": FAINT, "AP75": BASE}

Record = Mapping[str, Any]


@dataclass(frozen=True)
class BestStudent:
    """The student of the best evaluation so far."""

    epoch: float
    metrics: Record
    """``CocoMetrics.as_dict()``."""
    diagnosis: Diagnosis
    basis: str
    """A sentence on the images that it was diagnosed on."""
    pictures: Sequence[tuple[str, bytes]]
    """Caption and JPEG file of each image with mistakes."""


def run_page(
    name: str,
    summary: str,
    records: Sequence[Record],
    job: str,
    best: BestStudent | None,
    samples: tuple[str, bytes] | None,
) -> str:
    """Return the page as HTML.

    Args:
        summary: a sentence on what is trained.
        records: those of the run's log, in order.
        job: all keys, as YAML.
        samples: caption and JPEG file of sample images with the detections of the last evaluation.

    Raises UserError if matplotlib is not installed.
    """
    parts = [html("<h1>{}</h1><p class=note>{} {}</p>", name, summary, _state(records))]
    with drawing():
        figures = {"AP on data.val": _ap(records), "Losses": _losses(records), "Learning rate": _lr(records)}
        for heading, figure in figures.items():
            if figure is not None:
                parts.append(html("<h2>{}</h2><figure>{}</figure>", heading, Markup(svg(figure))))
        if samples is not None:
            parts += [Markup("<h2>Samples</h2>"), picture(*samples)]
        if best is not None:
            told = f"The student of epoch {best.epoch:g}, the best so far. {best.basis}"
            parts.append(html("<h1>{}</h1><p class=note>{}</p>", "What the student gets right and wrong", told))
            parts += detector_sections(best.metrics, best.diagnosis, best.pictures)
    notes = [record["note"] for record in records if "note" in record][-SHOWN_NOTES:]
    if notes:
        items = Markup().join(html("<li>{}</li>", note) for note in notes)
        parts.append(html("<h2>{}</h2><ul class=notes>{}</ul>", "Notes", items))
    parts.append(html("<h2>Job</h2><details><summary>every key</summary><pre>{}</pre></details>", job))
    return document(name, parts)


def _state(records: Sequence[Record]) -> str:
    """Return where the run stands, in words."""
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    if not records:
        return f"{made}."
    steps = [record for record in records if "losses" in record]
    last = max(records, key=lambda record: record["step"])  # the last one may be of an evaluation that took its time
    text = f"Step {last['step']} of {last['steps']}, epoch {last['epoch']:g}; {made}."
    scores = [(record["val"]["AP"], record["epoch"]) for record in records if "val" in record]
    known = [score for score in scores if score[0] is not None]
    if known:
        text += f" Best AP {number(max(known)[0])} after epoch {max(known)[1]:g}."
    if steps:
        now = steps[-1]
        text += (
            f" {now['images_per_second']:.3g} images a second on {now.get('workers', 1)} "
            f"{'worker' if now.get('workers', 1) == 1 else 'workers'}, {now['data_wait']:.0%} of the time waiting for data, "
            f"{now['memory_mib']:,.0f} MiB at most."
        )
    return text


def _ap(records: Sequence[Record]) -> Figure | None:
    scored = [record for record in records if "val" in record]
    if not any(record["val"]["AP"] is not None for record in scored):
        return None
    from matplotlib.ticker import MaxNLocator

    figure, axes = axes_of(8, 3)
    for name, colour in METRICS.items():
        points = [(record["epoch"], record["val"][name]) for record in scored if record["val"][name] is not None]
        axes.plot(*zip(*points, strict=True), color=colour, marker=".", lw=1.6, label=name)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(figure, "percent")


def _losses(records: Sequence[Record]) -> Figure | None:
    steps = [record for record in records if "losses" in record]
    if not steps:
        return None
    figure, axes = axes_of(8, 4)
    names = list(dict.fromkeys(name for record in steps for name in record["losses"]))
    for name in sorted(names, key=lambda name: name != "total"):
        points = np.array([(each["epoch"], each["losses"][name]) for each in steps if name in each["losses"]])
        look = {"lw": 1.8, "color": INK} if name == "total" else {"lw": 1.1}
        axes.plot(*_averaged(points).T, label=literal(name.removeprefix("loss_")), **look)
    values = [value for record in steps for value in record["losses"].values()]
    if 0 < min(values) < max(values) / WIDE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=min(0, *values))
    return _finished(figure, "loss")


def _lr(records: Sequence[Record]) -> Figure | None:
    points = np.array([(record["epoch"], record["lr"]) for record in records if "lr" in record])
    if not len(points):
        return None
    figure, axes = axes_of(8, 1.8)
    axes.plot(*_averaged(points).T, color=BASE, lw=1.4)
    return _finished(figure, "learning rate", legend=False)


def _averaged(points: np.ndarray) -> np.ndarray:
    """Return at most ``POINTS`` of the points (N, 2), each the mean of neighbouring ones."""
    return np.stack([part.mean(axis=0) for part in np.array_split(points, min(len(points), POINTS))])


def _finished(figure: Figure, up: str, legend: bool = True) -> Figure:
    (axes,) = figure.axes
    axes.set(xlabel="epoch", ylabel=up)
    axes.set_xlim(left=0)
    axes.grid(color=FAINT, alpha=0.2)
    if legend:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure
