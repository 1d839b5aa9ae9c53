"""The evidence: HEAD's rows beside their own baselines on real photos, with seeds. ``evidence_rows.py`` has the list.

    python bench/evidence.py prepare --images DIR --train A.json --val B.json --test C.json     pack the photos, once
    python bench/evidence.py search [ROW ...]          choose each row's learning rate on val: 3 values, a seed of its own
    python bench/evidence.py run ROW ... [--seeds 0 1 2]     train, evaluate on test once, append to docs/results.jsonl
    python bench/evidence.py all                       every row, seed after seed
    python bench/evidence.py table                     write the tables of README.md and docs/results.md anew

``search``, ``run`` and ``all`` stop after --minutes and then exit with code 3; the same command goes on where it stopped, so
``while python bench/evidence.py all; test $? = 3; do :; done`` makes everything. Several processes may go at once: each takes
what no other is at. What is recorded is not done again.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

from evidence_plan import Bench
from evidence_rows import ROWS
from evidence_run import OutOfTimeError, forget, run, work
from evidence_search import searches
from evidence_tables import Order, write_tables
from revision import ROOT

from headkd_ray.doors import user_errors
from headkd_ray.errors import JobError
from headkd_ray.prepare import prepare

JOBS = ROOT / "jobs" / "evidence"


def order() -> Order:
    """What the tables need to know about the rows."""
    return {tier: {name: row.against for name, row in rows.items()} for tier, rows in ROWS.items()}


# --- the command ---


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code: 3 = out of time, there is more to do."""
    with user_errors():
        options = _parser().parse_args(arguments)
        try:
            _do(options)
        except OutOfTimeError:
            print(f"{options.minutes:g} minutes are over; the same command goes on")
            return 3
    return 0


def _do(options: argparse.Namespace) -> None:
    if options.command == "prepare":
        for split in ("train", "val", "test"):
            out = str(options.data / split)
            meta = prepare(getattr(options, split), options.images, out, shard_images=128).meta
            print(f"{out}: {meta.images} images, {meta.boxes} boxes, {len(meta.classes)} classes")
        return
    if options.command == "table":
        write_tables(options.results, order(), ROOT / "README.md", ROOT / "docs" / "results.md")
        return
    tier, until = options.tier, time.monotonic() + 60 * getattr(options, "minutes", math.inf)
    places = JOBS / tier, options.data, options.storage / tier, options.results
    bench = Bench(tier, ROWS[tier], *places, deadline=until)
    rows = getattr(options, "rows", None) or list(bench.rows)
    unknown = [row for row in rows if row not in bench.rows]
    if unknown:
        raise JobError([f"{row}: no such row; one of {', '.join(bench.rows)}" for row in unknown])
    if options.command == "forget":
        forget(bench, rows)
    elif options.command == "search":
        work(bench, searches(bench, rows))
    else:
        once = [(row, 0) for row in rows if row in bench.teachers]
        pairs = once + [(row, seed) for seed in options.seeds for row in rows if row not in bench.teachers]
        work(bench, [partial(run, bench, row, seed) for row, seed in pairs])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=ROWS, default="micro")
    parser.add_argument("--data", type=Path, default=Path("data/evidence"), help="prepared splits (default %(default)s)")
    parser.add_argument("--storage", type=Path, default=Path("runs/evidence"), help="runs (default %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results.jsonl", help="default: docs/results.jsonl")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    preparing = commands.add_parser("prepare", help="pack photos and COCO annotations into --data")
    for name, what in {"images": "folder of the photos", **dict.fromkeys(("train", "val", "test"), "COCO JSON")}.items():
        preparing.add_argument(f"--{name}", required=True, help=what)
    running = {
        "search": commands.add_parser("search", help="choose the learning rate of rows (all, if none is named)"),
        "run": commands.add_parser("run", help="make rows"),
        "all": commands.add_parser("all", help="make all rows"),
    }
    for name, command in running.items():
        if name != "all":
            command.add_argument("rows", nargs="*" if name == "search" else "+", metavar="ROW")
        if name != "search":
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED")
        command.add_argument("--minutes", type=float, default=9.0, help="stop training after so many (default %(default)s)")
    commands.add_parser("table", help="write the tables of README.md and docs/results.md")
    commands.add_parser("forget", help="delete rows, after a bug").add_argument("rows", nargs="+", metavar="ROW")
    return parser


if __name__ == "__main__":
    sys.exit(main())
