"""Progress of a search in the terminal: one line per event, and a table of the trials at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console

from headkd_ray.report.console import number
from headkd_ray.report.terminal import Terminal
from headkd_ray.tuning.analysis.table import print_trials, shown
from headkd_ray.tuning.space import Search
from headkd_ray.tuning.trial_records import Trial


class SearchConsole:
    """A context manager that receives a search's events (see ``tuning.on_ray.tuner``) and prints them."""

    def __init__(self, search: Search, console: Console | None = None) -> None:
        self.search = search
        self.console = console or Terminal(soft_wrap=True)
        self.started = time.monotonic()

    def __enter__(self) -> SearchConsole:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.console.print("stopped; --resume continues the search", markup=False)

    def __call__(self, event: dict[str, Any]) -> None:
        minutes = (time.monotonic() - self.started) / 60
        self.console.print(f"{minutes:6.1f} min  {line(event, self.search)}", markup=False)

    def summary(self, trials: Sequence[Trial]) -> None:
        """Print the table of all trials."""
        print_trials(self.console, self.search, trials)


def line(event: dict[str, Any], search: Search) -> str:
    """Return the line for an event: a trial starts, is evaluated, or has ended."""
    trial: Trial = event["trial"]
    metric, cost = search.spec.objective.metric, search.spec.objective.cost
    head = f"trial {trial.number}"
    if "epoch" in event:
        copied = f"  (copied trial {trial.copies[-1]['from']})" if trial.copies else ""
        return f"{head}  epoch {event['epoch']}  {metric} {number(event['value'])}{copied}"
    if trial.state == "running":
        return f"{head}  " + "  ".join(f"{key}={shown(value)}" for key, value in trial.values.items())
    if trial.state == "failed":
        return f"{head}  failed: {trial.cause}"
    if trial.state == "stopped":
        return f"{head}  stopped by {search.spec.scheduler.kind}"
    seeds = f" (mean of {len(trial.results)} seeds)" if len(trial.results) > 1 else ""
    costs = f"  {cost} {trial.cost[cost]:.4g}" if cost is not None else ""
    return f"{head}  finished  {metric} {number(trial.mean(metric))}{seeds}{costs}"
