"""The table of docs/reliability.md, from the records of bench/faults.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fault_commands import COMMANDS
from fault_kinds import FAULTS

Record = dict[str, Any]


def section(records: Sequence[Record]) -> str:
    """Return the table, one row per command and fault."""
    if not records:
        return "There are no figures yet: `python bench/faults.py run`."
    lines = ["| command | killed | times | survived | steps repeated | seconds lost |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for command, kinds in FAULTS.items():
        for fault, (title, _) in kinds.items():
            own = [record for record in records if record["command"] == command]
            hits = [(hit, survived(record)) for record in own for hit in record["hits"] if hit["fault"] == fault]
            if hits:
                good = [hit for hit, through in hits if through]
                repeated = _spread([hit["repeated"] for hit in good])
                lost = _spread([hit["seconds"] for hit in good if hit["seconds"] is not None])
                cells = [COMMANDS[command].title, title, len(hits), len(good), repeated, lost]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    made = "; ".join(
        f"{title} {', '.join(dict.fromkeys(record[key] for record in records))}"
        for title, key in {"Ray": "ray", "torch": "torch", "made on": "date", "with revision": "revision"}.items()
    )
    faults = sum(len(record["hits"]) for record in records)
    runs = f"{sum(map(survived, records))} of {len(records)} runs, with {faults} faults, survived"
    return "\n".join([*lines, "", f"{runs}; median (least to greatest). {made}."])


def survived(record: Record) -> bool:
    return record["same"] and not record["left"] and "error" not in record


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})" if values else "–"
