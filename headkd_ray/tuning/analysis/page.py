"""The results of a search as one self-contained HTML page, readable in light and dark mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from markupsafe import Markup

from headkd_ray.report.html import cell, document, html
from headkd_ray.tuning.analysis.best import best_trial, render_best
from headkd_ray.tuning.analysis.table import UNITS, ranked, short_names, shown, spread
from headkd_ray.tuning.space import Search
from headkd_ray.tuning.trial_records import Trial

CAPTIONS = {
    "history": "Every finished trial, and the best so far.",
    "curves": "The objective at each evaluation; a cross marks where a trial was stopped or failed.",
    "parallel": "A line is a finished trial; its colour is the objective, blue (low) to orange (high). The thick one is best.",
    "importance": "",
    "slices": "Every finished trial, plotted against one key at a time; orange is the best, blue the base job.",
    "pareto": "No trial beats an orange one in both metric and cost: the choice between them is yours.",
}


def page(search: Search, trials: Sequence[Trial], drawings: Mapping[str, str], note: str) -> str:
    """Return the page as HTML.

    Args:
        drawings: SVG elements by name (``figures.svg``).
        note: basis of the importances, or why there are none.
    """
    spec = search.spec
    best = best_trial(search, trials)
    parts = [html("<h1>{}</h1>", spec.run.name), html("<p class=note>{}</p>", _summary(search, trials))]
    if best is not None:
        parts.append(_headline(search, trials, best))
    for name, drawing in drawings.items():
        caption = note if name == "importance" else CAPTIONS[name]
        parts.append(html("<figure>{}<figcaption>{}</figcaption></figure>", Markup(drawing), caption))
    parts += [Markup("<h2>Trials</h2>\n<p class=note>Click a heading to sort.</p>"), _table(search, trials, best)]
    if best is not None:
        parts.append(html("<h2>The best trial's job</h2><details><summary>trial {}, every key</summary>", best.number))
        parts.append(html("<pre>{}</pre></details>", render_best(search, best)))
    return document(f"{spec.run.name}: search", parts)


def _summary(search: Search, trials: Sequence[Trial]) -> str:
    spec = search.spec
    counts = {state: sum(trial.state == state for trial in trials) for state in ("finished", "stopped", "failed", "running")}
    counted = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    seeds = f"seeds {', '.join(map(str, search.seeds))}" if len(search.seeds) > 1 else f"seed {search.seeds[0]}"
    kind = spec.searcher.kind + ("" if spec.scheduler.kind == "none" else f" with {spec.scheduler.kind}")
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f"Base job {spec.job}; {kind}; {seeds}; {len(trials)} trials: {counted}. {made}."


def _headline(search: Search, trials: Sequence[Trial], best: Trial) -> Markup:
    metric = search.spec.objective.metric
    names = short_names(list(search.spec.space))
    base = next((trial for trial in trials if trial.number == 0), None)
    rows = [(f"best: trial {best.number}", f"{metric} {spread(best, metric)} %")]
    if base is not None and base is not best:
        rows.append(("trial 0, the base job", f"{metric} {spread(base, metric)} %"))
    for key, value in best.values.items():
        before = f" (base job: {shown(base.values[key])})" if base is not None and key in base.values else ""
        rows.append((names[key], shown(value) + before))
    return html("<dl>{}</dl>", Markup().join(html("<dt>{}</dt><dd>{}</dd>", *row) for row in rows))


def _table(search: Search, trials: Sequence[Trial], best: Trial | None) -> Markup:
    objective = search.spec.objective
    names = short_names(list(search.spec.space))
    heads = ["trial", "state", f"{objective.metric} (%)", "epochs", "minutes"]
    heads += [UNITS[objective.cost]] if objective.cost is not None else []
    heads += [*names.values(), "cause"]
    text = {"state", "cause"}
    head = Markup().join(html("<th{}>{}</th>", Markup(" class=text" if name in text else ""), name) for name in heads)
    rows = []
    for trial in ranked(search, trials):
        mean = trial.mean(objective.metric)
        seen = [value for _, value in trial.curve if value is not None]
        cells = [
            html("<td>{}</td>", trial.number),
            html("<td class=text>{}</td>", trial.state),
            cell(spread(trial, objective.metric), mean if mean == mean else max(seen, default=None)),
            html("<td>{:g}</td>", max((epoch for epoch, _ in trial.curve), default=0)),
            html("<td>{}</td>", "" if trial.ended is None else f"{(trial.ended - trial.started) / 60:.1f}"),
        ]
        if objective.cost is not None:
            cost = trial.cost.get(objective.cost)
            cells.append(cell("" if cost is None else f"{cost:.4g}", cost))
        for key in names:
            value = trial.values.get(key, "")
            cells.append(cell("" if value == "" else shown(value), value if isinstance(value, int | float) else None))
        cells.append(html("<td class='text cause'>{}</td>", trial.cause or ""))
        rows.append(html("<tr{}>{}</tr>", Markup(" class=best" if trial is best else ""), Markup().join(cells)))
    body = Markup("\n").join(rows)
    return html("<div class=scroll><table><thead><tr>{}</tr></thead><tbody>\n{}\n</tbody></table></div>", head, body)
