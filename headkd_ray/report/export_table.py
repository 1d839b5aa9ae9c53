"""The table of an export: what each file keeps of the checkpoint's AP, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from headkd_ray.report.console import number


def export_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of an export's ``rows``, as ``headkd_ray.export`` writes them to JSON."""
    threads = sorted({int(count) for row in rows for count in row["latency"]})
    table = Table(
        title="AP (%), size, and ms an image on this CPU: median (95th percentile)",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("detector", overflow="fold")
    for name in ("format", "AP", "AP50", "MB", *(_threads(count) for count in threads)):
        table.add_column(name, justify="left" if name == "format" else "right", no_wrap=True)
    for row in rows:
        metrics = row["metrics"] or {"AP": None, "AP50": None}
        times = (row["latency"].get(str(count)) for count in threads)
        cells = [number(metrics["AP"]), number(metrics["AP50"]), f"{row['bytes'] / 1e6:.1f}"]
        cells += ["–" if time is None else f"{time['median']:.1f} ({time['p95']:.1f})" for time in times]
        table.add_row(Text(row["name"]), row["format"], *cells)
    return table


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
