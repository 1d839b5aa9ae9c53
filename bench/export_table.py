"""The README's table of exports: ``python bench/export_table.py`` exports the quickstart's student, measures and writes it.

Run it after the quickstart and while nothing else runs on the machine. It takes a few minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evidence_tables import insert

from headkd_ray.cli import user_errors
from headkd_ray.export import Request, export
from headkd_ray.report.console import number

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- export: begin (python bench/export_table.py) -->", "<!-- export: end -->"
NONE = "There are no figures yet. `make quickstart`, then `python bench/export_table.py`, makes them."
ROLES = {"head": "student with HEAD", "baseline": "student alone", "teacher": "teacher"}
"""What the quickstart's runs are called in the table, by the name of their folder; the first is exported."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", default="runs/quickstart", help="folder of the quickstart (default: %(default)s)")
    parser.add_argument("--images", type=int, help="compare on so many validation images (default: all)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the markers (default: the README)")
    with user_errors():
        options = parser.parse_args(arguments)
        runs = Path(options.quickstart)
        students = {role: str(runs / name / "student") for name, role in ROLES.items()}
        first, *others = students.values()
        report = export(
            Request(
                checkpoint=first,
                targets=["onnx", "onnx-int8", "torch-export", *(["openvino"] if find_spec("openvino") else [])],
                out=str(runs / "exported"),
                val=str(runs / "data" / "val"),
                calibrate=str(runs / "data" / "train"),
                images=options.images,
                beside=others,
                json=str(runs / "exported" / "report.json"),
            ),
            lambda warning: print(f"warning: {warning}", file=sys.stderr),
        )
        roles = {place: role for role, place in students.items()}
        table = section([{**row, "name": roles.get(row["name"], row["name"])} for row in report["rows"]], report)
        options.readme.write_text(insert(options.readme.read_text(encoding="utf-8"), table, BEGIN, END), encoding="utf-8")
        print(table)
    return 0


def section(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> str:
    """Return the table of a report's ``rows`` as Markdown, with a sentence about how it was measured."""
    threads = sorted({int(count) for row in rows for count in row["latency"]})
    heads = ["detector", "runs in", "AP", "MB", *(f"ms, {count} thread{'s' * (count > 1)}" for count in threads)]
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 2)}"]
    for row in rows:
        times = (row["latency"][str(count)] for count in threads)
        cells = [number(row["metrics"]["AP"]), f"{row['bytes'] / 1e6:.1f}"]
        cells += [f"{time['median']:.1f} ({time['p95']:.1f})" for time in times]
        lines.append(f"| {row['name']} | {row['format']} | {' | '.join(cells)} |")
    made = f"{report['images']} images, {report['cpu']}, torch {report['versions']['torch'].split('+')[0]}"
    return "\n".join([*lines, "", f"Time of an image, batch 1: median (95th percentile). {made}."])


if __name__ == "__main__":
    sys.exit(main())
