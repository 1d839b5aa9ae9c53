"""Figures of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from headkd_ray.job.render import inline
from headkd_ray.report.plots import BASE, BEST, FAINT, INK, axes_of, drawing, literal
from headkd_ray.tuning.analysis.table import UNITS, ranked, short_names, shown
from headkd_ray.tuning.search_spec import ParameterSpec
from headkd_ray.tuning.space import Search
from headkd_ray.tuning.trial_records import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALE = ("#2f78d8", "#a765a8", "#ef7d12")
"""Colours from a low metric to a high one, all visible on white and on black."""
MISSING = -0.12
"""Height on an axis of the parallel coordinates that shows that a key is not varied in a trial."""

NUMBERED = 60
"""Most trials whose numbers are all written beside their points."""


def figures(search: Search, trials: Sequence[Trial], importance: Mapping[str, float], note: str) -> dict[str, Figure]:
    """Draw the figures and return them by name, without those for which there is nothing to draw.

    Args:
        importance: share of each key (``importances``).
        note: why there are no shares, which is then shown in their place.

    Raises UserError if matplotlib is not installed.
    """
    with drawing():
        drawn = {
            "history": _history(search, trials),
            "curves": _curves(search, trials),
            "parallel": _parallel(search, trials),
            "importance": _importance(importance, note),
            "slices": _slices(search, trials),
            "pareto": _pareto(search, trials),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _history(search: Search, trials: Sequence[Trial]) -> Figure | None:
    metric = search.spec.objective.metric
    finished = sorted((trial for trial in trials if trial.state == "finished"), key=lambda trial: trial.ended or 0.0)
    if not finished:
        return None
    figure, axes = axes_of(8, 3.2)
    start = min(trial.started for trial in trials)
    minutes = [((trial.ended or start) - start) / 60 for trial in finished]
    means = [trial.mean(metric) for trial in finished]
    best = [max(means[: count + 1]) for count in range(len(means))]
    axes.step(minutes, best, where="post", color=BEST, label="best so far")
    axes.scatter(minutes, means, color=[BASE if trial.number == 0 else FAINT for trial in finished], s=24, zorder=3)
    firsts = [place for place, value in enumerate(best) if place == 0 or value > best[place - 1]]
    _number(axes, finished, minutes, means, [finished[place] for place in firsts])
    axes.scatter([], [], color=BASE, s=24, label="trial 0: the base job")
    axes.set(xlabel="minutes", ylabel=f"{metric} on val (%)", title="Trials as they finished")
    axes.legend(frameon=False, loc="lower right")
    return figure


def _curves(search: Search, trials: Sequence[Trial]) -> Figure | None:
    from matplotlib.ticker import MaxNLocator

    metric = search.spec.objective.metric
    order = ranked(search, trials)
    best = order[0].number if order and order[0].state == "finished" else None
    shown = {trial.number: [(x, y) for x, y in trial.curve if y is not None] for trial in order}
    if not any(shown.values()):
        return None
    figure, axes = axes_of(8, 3.8)
    axes.plot(*_broken([shown[trial.number] for trial in order]), color=FAINT, marker=".", lw=1, alpha=0.7)
    ends = [shown[trial.number][-1] for trial in order if trial.state in ("stopped", "failed") and shown[trial.number]]
    axes.plot([x for x, _ in ends], [y for _, y in ends], "x", color=FAINT, ms=7)
    for number, colour, label in ((0, BASE, "trial 0: the base job"), (best, BEST, f"best: trial {best}")):
        if number is not None and shown.get(number):
            axes.plot(*zip(*shown[number], strict=True), color=colour, marker=".", lw=2, label=label)
    axes.plot([], [], "x", color=FAINT, label="stopped or failed")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    seed = f", seed {search.seeds[0]}" if len(search.seeds) > 1 else ""
    axes.set(xlabel="epoch", ylabel=f"{metric} on val (%)", title=f"Learning curves{seed}")
    axes.legend(frameon=False)
    return figure


def _parallel(search: Search, trials: Sequence[Trial]) -> Figure | None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    metric = search.spec.objective.metric
    finished = [trial for trial in ranked(search, trials) if trial.state == "finished"]
    if len(finished) < 2:
        return None
    keys = list(search.spec.space)
    means = [trial.mean(metric) for trial in finished]
    spread = max(means) - min(means) or 1.0
    shades = LinearSegmentedColormap.from_list("trials", SCALE)
    figure, axes = axes_of(max(6.0, 1.5 * (len(keys) + 1)), 4.2)
    lines = []
    for trial, mean in zip(finished, means, strict=True):
        heights = [place(search.spec.space[key], trial.values[key]) if key in trial.values else MISSING for key in keys]
        lines.append(list(enumerate([*heights, (mean - min(means)) / spread])))
    colours = [shades(line[-1][1]) for line in lines]
    axes.add_collection(LineCollection(lines[:0:-1], colors=colours[:0:-1], linewidths=1.2, alpha=0.8))
    axes.add_collection(LineCollection(lines[:1], colors=colours[:1], linewidths=3))
    for x, key in enumerate(keys):
        axes.axvline(x, color=INK, lw=0.8)
        for height, text in ticks(search.spec.space[key]):
            axes.annotate(text, (x, height), textcoords="offset points", xytext=(4, 0), fontsize=8, va="center")
    axes.axvline(len(keys), color=INK, lw=0.8)
    for height, value in ((0.0, min(means)), (1.0, max(means))):
        axes.annotate(f"{value:.1f}", (len(keys), height), textcoords="offset points", xytext=(4, 0), fontsize=8, va="center")
    if any(key not in trial.values for trial in finished for key in keys):
        axes.text(-0.05, MISSING, "not varied", fontsize=8, ha="right", va="center")
    names = [literal(name).replace(".", ".\n") for name in short_names(keys).values()]
    axes.set_xticks(range(len(keys) + 1), [*names, f"{metric} (%)"], fontsize=9)
    axes.set(yticks=[], ylim=(MISSING - 0.06, 1.06), xlim=(-0.15, len(keys) + 0.45), title="Values of the finished trials")
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def _importance(importance: Mapping[str, float], note: str) -> Figure:
    names = short_names(list(importance))
    figure, axes = axes_of(8, 0.8 + 0.34 * max(1, len(importance)))
    if not importance:
        axes.text(0, 0.5, literal(fill(note, 100)), va="center")
        axes.set_axis_off()
        axes.set_title("Importance of the keys")
        return figure
    rows = list(importance.items())[::-1]
    axes.barh([literal(names[key]) for key, _ in rows], [share for _, share in rows], color=BASE)
    for y, (_, share) in enumerate(rows):
        axes.annotate(f"{share:.0%}", (share, y), textcoords="offset points", xytext=(4, 0), fontsize=9, va="center")
    axes.set(xlabel="share of the explained variance (fANOVA)", title="Importance of the keys")
    return figure


def _slices(search: Search, trials: Sequence[Trial]) -> Figure | None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    metric = search.spec.objective.metric
    finished = [trial for trial in ranked(search, trials) if trial.state == "finished"]
    if len(finished) < 2:
        return None
    keys = list(search.spec.space)
    columns = min(4, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = Figure((2.6 * columns, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, key in zip(grid.flat, keys, strict=False):
        parameter, choices = search.spec.space[key], list(search.spec.space[key].choice or ())
        marked = [trial for trial in finished if trial.number == 0 or trial is finished[0]]
        for z, some in ((2, finished), (3, marked[::-1])):  # the marked ones above the others, the best last
            points = [(_position(trial.values.get(key), choices), trial) for trial in some]
            kept = [(x, trial.mean(metric), trial) for x, trial in points if x is not None]
            colours = [BEST if trial is finished[0] else BASE if trial.number == 0 else FAINT for _, _, trial in kept]
            axes.scatter([x for x, _, _ in kept], [y for _, y, _ in kept], color=colours, s=22, zorder=z)
        if parameter.kind.startswith("log"):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())  # labels like 2 x 10^-3, 3 x 10^-3 would overlap
        if choices:
            axes.set_xticks(range(len(choices)), [literal(inline(value)) for value in choices], fontsize=8)
            axes.set_xlim(-0.5, len(choices) - 0.5)
        else:
            axes.scatter(parameter.ends, [finished[0].mean(metric)] * 2, alpha=0)  # make the axis show the whole range
        axes.set_title(literal(short_names(keys)[key]), fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"{metric} (%)")
    for axes in grid.flat[len(keys) :]:
        axes.set_visible(False)
    figure.suptitle("Each key by itself", color=INK)
    return figure


def _pareto(search: Search, trials: Sequence[Trial]) -> Figure | None:
    objective = search.spec.objective
    finished = [trial for trial in trials if trial.state == "finished"]
    if objective.cost is None or not finished:
        return None
    figure, axes = axes_of(8, 4)
    front = pareto_front(search, finished)
    costs, means = [trial.cost[objective.cost] for trial in finished], [trial.mean(objective.metric) for trial in finished]
    beaten = {trial.number for trial in finished} - {trial.number for trial in front}
    colours = [
        BASE if trial.number == 0 and trial.number in beaten else FAINT if trial.number in beaten else BEST
        for trial in finished
    ]
    axes.scatter(costs, means, color=colours, s=28, zorder=3)
    _number(axes, finished, costs, means, front)
    points = [(trial.cost[objective.cost], trial.mean(objective.metric)) for trial in front]
    axes.step(*zip(*points, strict=True), where="post", color=BEST, label="Pareto front")
    axes.scatter([], [], color=BASE, s=28, label="trial 0: the base job")
    axes.set(xlabel=UNITS[objective.cost], ylabel=f"{objective.metric} on val (%)", title="Quality against cost")
    axes.legend(frameon=False, loc="lower right")
    return figure


def _number(axes: Axes, trials: Sequence[Trial], xs: Sequence[float], ys: Sequence[float], chief: Sequence[Trial]) -> None:
    """Write the trials' numbers beside their points; of many trials, whose numbers would overlap, only those of ``chief``."""
    numbers = {trial.number for trial in (trials if len(trials) <= NUMBERED else chief)}
    for trial, x, y in zip(trials, xs, ys, strict=True):
        if trial.number in numbers:
            axes.annotate(str(trial.number), (x, y), textcoords="offset points", xytext=(5, 3), fontsize=8)


def _broken(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """Return the curves as one line with gaps: a figure of hundreds of lines would take minutes to draw."""
    points = [point for curve in curves for point in (*curve, (math.nan, math.nan))]
    return [x for x, _ in points], [y for _, y in points]


def _position(value: Any, choices: Sequence[Any]) -> float | None:
    """Return where a value stands on its key's axis; None if it is not varied, or of trial 0 and outside the space."""
    if choices:
        return choices.index(value) if value in choices else None
    return value if isinstance(value, int | float) else None


def pareto_front(search: Search, trials: Sequence[Trial]) -> list[Trial]:
    """Return the finished trials that no other beats in the metric at the same or a lower cost, by increasing cost.

    (Optuna's own front would lack trial 0 if the base job lies outside the space.)
    """
    objective = search.spec.objective
    if objective.cost is None:
        return []
    cost = objective.cost
    front: list[Trial] = []
    finished = [trial for trial in trials if trial.state == "finished"]
    for trial in sorted(finished, key=lambda trial: (trial.cost[cost], -trial.mean(objective.metric))):
        if not front or trial.mean(objective.metric) > front[-1].mean(objective.metric):
            front.append(trial)
    return front


def place(parameter: ParameterSpec, value: Any) -> float:
    """Return where a value lies in its range, from 0 to 1, slightly beyond if it is outside, or MISSING if it is no choice."""
    if parameter.choice is not None:
        count = len(parameter.choice)
        return parameter.choice.index(value) / max(1, count - 1) if value in parameter.choice else MISSING
    if not isinstance(value, int | float):
        return MISSING
    low, high = parameter.ends
    if parameter.kind.startswith("log"):
        low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
    return min(max((value - low) / (high - low), -0.05), 1.05)


def ticks(parameter: ParameterSpec) -> list[tuple[float, str]]:
    """Return the (position, text) of the labels on a parameter's axis."""
    return [(place(parameter, end), literal(shown(end))) for end in parameter.ends]
