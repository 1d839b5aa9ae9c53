"""The trials of a search as a table in the terminal, the best first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from headkd_ray.job.render import inline
from headkd_ray.report.console import number
from headkd_ray.report.terminal import Terminal
from headkd_ray.tuning.space import Search
from headkd_ray.tuning.trial_records import Trial

UNITS = {"params": "params (M)", "flops": "GFLOPs", "latency": "latency (ms)", "onnx_latency": "ONNX latency (ms)"}
"""Headings of the costs."""
WIDE = 250
"""Width of a table that goes into a file or a pipe, in characters."""


def ranked(search: Search, trials: Sequence[Trial]) -> list[Trial]:
    """Sort trials: finished ones by the objective's metric, the best first, then stopped, running and failed ones."""
    order = ["finished", "stopped", "running", "failed"]
    metric = search.spec.objective.metric

    def place(trial: Trial) -> tuple[int, float, int]:
        mean = trial.mean(metric)
        return order.index(trial.state), math.inf if math.isnan(mean) else -mean, trial.number

    return sorted(trials, key=place)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Shorten each dotted key to the fewest last parts that distinguish it from the others: fcos.ckd_weight."""
    names = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[-count:])
            if sum(f".{other}".endswith(f".{name}") for other in keys) == 1:
                break
        names[key] = name
    return names


def trial_table(search: Search, trials: Sequence[Trial]) -> Table:
    """Return a table with one row per trial: state, metric in percent (mean ± sample standard deviation), cost, values."""
    objective = search.spec.objective
    table = Table(title=f"{search.spec.run.name}: {len(trials)} trials")
    heads = ["trial", "state", f"{objective.metric} (%)"] + ([UNITS[objective.cost]] if objective.cost is not None else [])
    for name in (*heads, *short_names(list(search.spec.space)).values()):
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    for trial in ranked(search, trials):
        cost = [f"{trial.cost[objective.cost]:.4g}" if objective.cost in trial.cost else "–"] if objective.cost else []
        values = [shown(trial.values[key]) if key in trial.values else "–" for key in search.spec.space]
        table.add_row(str(trial.number), trial.state, spread(trial, objective.metric), *cost, *map(Text, values))
    return table


def print_trials(console: Console, search: Search, trials: Sequence[Trial]) -> None:
    """Print the table; outside a terminal, at its full width."""
    console = console if console.is_terminal else Terminal(file=console.file, width=WIDE)
    console.print(trial_table(search, trials))


def spread(trial: Trial, metric: str) -> str:
    """Format mean ± sample standard deviation over seeds, or the best evaluation in brackets if the trial did not finish."""
    if not trial.results:
        seen = [value for _, value in trial.curve if value is not None]
        return f"({max(seen):.1f})" if seen else "–"
    return number(trial.mean(metric)) + (f" ± {trial.deviation(metric):.1f}" if len(trial.results) > 1 else "")


def shown(value: object) -> str:
    """Format a value as short YAML, with four significant digits for a float."""
    return f"{value:.4g}" if isinstance(value, float) else inline(value)
