"""Read and write the results file, and make the tables from it alone."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headkd_ray.comparison.spread import paired, spread
from headkd_ray.errors import DataError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
Record = dict[str, Any]
Rows = dict[str, dict[int, Record]]
"""Row -> seed -> record."""
Order = Mapping[str, Mapping[str, Sequence[str]]]
"""Tier -> row, in table order -> rows that it is compared with, its matched baseline first."""
README_ROWS = ("baseline", "assist", "akd", "head", "akd_pearson", "head_pearson", "tf_head")
"""Rows of each tier that the README shows."""


def read(results: Path) -> list[Record]:
    """Return all records, in order. Raises DataError."""
    records = []
    for number, text in enumerate(results.read_text(encoding="utf-8").splitlines() if results.exists() else [], start=1):
        try:
            records.append(json.loads(text))
        except ValueError as error:
            raise DataError(f"{results}:{number}: not a JSON object ({error}); mend or delete the line") from error
    return records


def append(results: Path, record: Record) -> None:
    """Append a record. Other processes may append at the same time."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(record) + "\n")


# --- tables ---

BEGIN, END = "<!-- results: begin (python bench/evidence.py table) -->", "<!-- results: end -->"
NONE = (
    "There are no figures yet. They are made by `python bench/evidence.py prepare`, `search`, `all` and `table`; "
    "[docs/results.md](docs/results.md) says how."
)


def write_tables(results: Path, order: Order, readme: Path, document: Path) -> None:
    """Put the tables of a results file between the markers of both documents."""
    records = read(results)
    for path, section in ((readme, readme_section(records, order)), (document, document_section(records, order))):
        path.write_text(insert(path.read_text(encoding="utf-8"), section), encoding="utf-8")


def insert(text: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """Return ``text`` with ``section`` between its markers. Raises DataError if a marker is missing."""
    before, found, rest = text.partition(begin)
    _, found_too, after = rest.partition(end)
    if not found or not found_too:
        raise DataError(f"the markers {begin} and {end} are missing")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def readme_section(records: Sequence[Record], order: Order) -> str:
    """Return the short tables: AP and the gain over the matched baseline, for README_ROWS."""
    parts = []
    for tier, rows in by_tier(records, order).items():
        lines = [f"Tier {tier}, {_machines(rows)}:", "", *_head("row", "seeds", "AP", "difference to its baseline")]
        for row in [row for row in README_ROWS if row in rows]:
            own = rows[row]
            against = order.get(tier, {}).get(row, ())[:1]
            lines.append(_cells(f"`{row}`", len(own), shown(_values(own, "AP")), _differences(rows, row, against)))
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, SHORT]) if parts else NONE


SHORT = (
    "AP in percent on test, mean ± sample standard deviation over seeds; differences are paired, seed by seed. All rows, "
    "machines and revisions: [docs/results.md](docs/results.md)."
)


def document_section(records: Sequence[Record], order: Order) -> str:
    """Return the full tables."""
    parts = []
    for tier, rows in by_tier(records, order).items():
        lines = [f"## Tier {tier}", ""]
        lines += _head("row", "seeds", "AP", "paired difference", "AP50", "APs", "APm", "APl", "val AP", "minutes")
        for row, own in rows.items():
            figures = [shown(_values(own, name)) for name in ("AP50", "APs", "APm", "APl", "val_AP")]
            minutes = shown([seconds / 60 for seconds in _values(own, "seconds")])
            differences = _differences(rows, row, order.get(tier, {}).get(row, ()), named=True)
            lines.append(_cells(f"`{row}`", len(own), shown(_values(own, "AP")), differences, *figures, minutes))
        lines += [
            "",
            *_head("row", "parameters", "images seen", "lr", "machine", "revision", "torch, torchvision, timm", "date"),
        ]
        for row, own in rows.items():
            rates = _each(f"{r['lr']:g}" + ("" if r["searched"] else " (not searched)") for r in own.values())
            versions = _each(f"{r['torch']}, {r['torchvision']}, {r['timm']}" for r in own.values())
            plain = [_each(r[name] for r in own.values()) for name in ("parameters", "images")]
            where = [_each(r[name] for r in own.values()) for name in ("machine", "revision")]
            dates = _each(r["date"] for r in own.values())
            lines.append(_cells(f"`{row}`", *plain, rates, *where, versions, dates))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) if parts else NONE.partition(";")[0] + "."


def by_tier(records: Sequence[Record], order: Order) -> dict[str, Rows]:
    """Return the records that count: for each row, those of the job recorded last; for a repeated seed, the last one.

    Rows are in ``order``, unknown ones at the end.
    """
    found: dict[str, Rows] = {}
    for tier in dict.fromkeys([*order, *(record["tier"] for record in records)]):
        ours = [record for record in records if record["tier"] == tier]
        job = {record["row"]: record["job"] for record in ours}
        rows: Rows = {}
        for row in dict.fromkeys([*order.get(tier, {}), *job]):
            own = {r["seed"]: r for r in ours if r["row"] == row and r["job"] == job[row]}
            if own:
                rows[row] = dict(sorted(own.items()))
        if rows:
            found[tier] = rows
    return found


def matched(rows: Rows, row: str, other: str, metric: str = "AP") -> list[float]:
    """Return row minus other, seed by seed, for seeds that both have with the same data, student and schedule."""
    ours, theirs = rows[row], rows.get(other, {})
    same = [seed for seed in ours if seed in theirs and ours[seed]["matched"] == theirs[seed]["matched"]]
    return paired(*({seed: own[seed][metric] for seed in same if own[seed][metric] is not None} for own in (ours, theirs)))


def shown(values: Sequence[float], sign: str = "") -> str:
    """Return mean ± sample standard deviation; a single value has no spread, and no values give a dash."""
    return format(spread(values), sign).replace("-", "−")


def _differences(rows: Rows, row: str, against: Sequence[str], named: bool = False) -> str:
    parts = []
    for other in (name for name in against if name in rows):
        found = matched(rows, row, other)
        fewer = f" (n = {len(found)})" if 0 < len(found) < len(rows[row]) else ""
        parts.append(f"{shown(found, '+')}{fewer}" + (f" to `{other}`" if named else ""))
    return "<br>".join(parts)


def _values(own: Mapping[int, Record], name: str) -> list[float]:
    return [record[name] for record in own.values() if record[name] is not None]


def _machines(rows: Rows) -> str:
    return _each(
        f"{r['machine']}, {r['threads']} thread{'s' * (r['threads'] != 1)}" for own in rows.values() for r in own.values()
    )


def _each(values: Iterable[Any]) -> str:
    """Join the distinct values, in order of first appearance."""
    return "; ".join(dict.fromkeys(str(value) for value in values))


def _head(first: str, *others: str) -> list[str]:
    return [_cells(first, *others), _cells("---", *("---:" for _ in others))]


def _cells(*values: Any) -> str:
    return f"| {' | '.join(str(value) for value in values)} |"
