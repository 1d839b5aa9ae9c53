"""Tables of COCO metrics: one row per run, and AP by class.

Names are ``Text``, because rich interprets brackets in a string as markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from headkd_ray.report.console import number
from headkd_ray.report.terminal import Terminal

HEADLINE = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def headline_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table of AP, AP50, AP75 and AP by object size, in percent, of each run's metrics (``CocoMetrics.as_dict``)."""
    table = Table(title="COCO box AP (%)")
    table.add_column("run")
    for name in HEADLINE:
        table.add_column(name, justify="right")
    for run, metrics in runs.items():
        table.add_row(Text(run), *(number(metrics[name]) for name in HEADLINE))
    return table


def class_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table of AP by class, one column per run and, with several runs, the last one's gain over the first."""
    first, *others = runs
    table = Table(title="AP by class (%)")
    table.add_column("class")
    for run in runs:
        table.add_column(Text(run), justify="right")
    if others:
        table.add_column(Text(f"{others[-1]} − {first}"), justify="right")
    for name, value in runs[first]["per_class"].items():
        values = [value, *(runs[run]["per_class"][name] for run in others)]
        known = values[0] is not None and values[-1] is not None
        gain = [f"{values[-1] - values[0]:+.1f}" if known else "–"] if others else []
        table.add_row(Text(name), *map(number, values), *gain)
    return table


def print_metrics(runs: Mapping[str, Mapping[str, Any]], console: Console | None = None) -> None:
    """Print the tables of AP and of AP by class."""
    console = console or Terminal()
    console.print(headline_table(runs))
    console.print(class_table(runs))
