"""The results of a search as one self-contained HTML page, readable in light and dark mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from markupsafe import Markup

from headkd_ray.tuning.analysis.best import best_trial, render_best
from headkd_ray.tuning.analysis.table import UNITS, ranked, short_names, shown, spread
from headkd_ray.tuning.space import Search
from headkd_ray.tuning.trial_records import Trial

STYLE = """
:root { color-scheme: light dark; --faint: light-dark(#6a6f78, #9aa0aa); --line: light-dark(#d9dce1, #3a3d43);
        --mark: light-dark(#fdf1e4, #3a2c1c); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       background: light-dark(#ffffff, #16181b); color: light-dark(#1d1e20, #e4e6ea); }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p.note, figcaption { color: var(--faint) }
figure { margin: 1rem 0; overflow-x: auto } figure svg { max-width: 100%; height: auto }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { cursor: pointer; user-select: none } th[data-order]::after { content: " \\2191" }
th[data-order="-1"]::after { content: " \\2193" }
td.text, th.text { text-align: left } tr.best { background: var(--mark) } td.cause { white-space: normal; min-width: 20rem }
pre { overflow-x: auto; font-size: .8rem; border: 1px solid var(--line); padding: .8rem } dl { display: grid; gap: 0 1rem;
grid-template-columns: max-content auto } dt { color: var(--faint) } dd { margin: 0 }
"""
SORT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex, order = head.dataset.order == 1 ? -1 : 1;
  for (const other of head.parentNode.children) delete other.dataset.order;
  head.dataset.order = order;
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return order * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
  };
  body.append(...[...body.rows].sort(compare));
};
"""
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
    parts = [_html("<h1>{}</h1>", spec.run.name), _html("<p class=note>{}</p>", _summary(search, trials))]
    if best is not None:
        parts.append(_headline(search, trials, best))
    for name, drawing in drawings.items():
        caption = note if name == "importance" else CAPTIONS[name]
        parts.append(_html("<figure>{}<figcaption>{}</figcaption></figure>", Markup(drawing), caption))
    if "importance" not in drawings:
        parts.append(_html("<p class=note>{}</p>", note))
    parts += [Markup("<h2>Trials</h2>\n<p class=note>Click a heading to sort.</p>"), _table(search, trials, best)]
    if best is not None:
        parts.append(_html("<h2>The best trial's job</h2><details><summary>trial {}, every key</summary>", best.number))
        parts.append(_html("<pre>{}</pre></details>", render_best(search, best)))
    return _html(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>{}: search</title><style>{}</style></head>\n<body>\n{}\n<script>{}</script></body></html>\n",
        spec.run.name,
        Markup(STYLE),
        Markup("\n").join(parts),
        Markup(SORT),
    )


def _html(template: str, *texts: Any) -> Markup:
    """Fill texts into the ``{}`` of an HTML template, escaping everything that is not ``Markup``."""
    return Markup(template).format(*texts)


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
    return _html("<dl>{}</dl>", Markup().join(_html("<dt>{}</dt><dd>{}</dd>", *row) for row in rows))


def _table(search: Search, trials: Sequence[Trial], best: Trial | None) -> Markup:
    objective = search.spec.objective
    names = short_names(list(search.spec.space))
    heads = ["trial", "state", f"{objective.metric} (%)", "epochs", "minutes"]
    heads += [UNITS[objective.cost]] if objective.cost is not None else []
    heads += [*names.values(), "cause"]
    text = {"state", "cause"}
    head = Markup().join(_html("<th{}>{}</th>", Markup(" class=text" if name in text else ""), name) for name in heads)
    rows = []
    for trial in ranked(search, trials):
        mean = trial.mean(objective.metric)
        seen = [value for _, value in trial.curve if value is not None]
        cells = [
            _html("<td>{}</td>", trial.number),
            _html("<td class=text>{}</td>", trial.state),
            _cell(spread(trial, objective.metric), mean if mean == mean else max(seen, default=None)),
            _html("<td>{:g}</td>", max((epoch for epoch, _ in trial.curve), default=0)),
            _html("<td>{}</td>", "" if trial.ended is None else f"{(trial.ended - trial.started) / 60:.1f}"),
        ]
        if objective.cost is not None:
            cost = trial.cost.get(objective.cost)
            cells.append(_cell("" if cost is None else f"{cost:.4g}", cost))
        for key in names:
            value = trial.values.get(key, "")
            cells.append(_cell("" if value == "" else shown(value), value if isinstance(value, int | float) else None))
        cells.append(_html("<td class='text cause'>{}</td>", trial.cause or ""))
        rows.append(_html("<tr{}>{}</tr>", Markup(" class=best" if trial is best else ""), Markup().join(cells)))
    body = Markup("\n").join(rows)
    return _html("<div class=scroll><table><thead><tr>{}</tr></thead><tbody>\n{}\n</tbody></table></div>", head, body)


def _cell(text: str, value: float | None) -> Markup:
    data = Markup() if value is None else _html(' data-value="{}"', repr(float(value)))
    return _html("<td{}>{}</td>", data, text)
