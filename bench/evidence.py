"""Train HEAD and its baselines on real photos, with several seeds. The rows are listed in ``evidence_rows.py``.

    python bench/evidence.py prepare --images DIR --train A.json --val B.json --test C.json     pack the photos, once
    python bench/evidence.py search [ROW ...]          choose each row's learning rate on val: 4 values, a seed of its own
    python bench/evidence.py run ROW ... [--seeds 0 1 2]     train, evaluate on test once, append to docs/results.jsonl
    python bench/evidence.py all                       every row, seed after seed
    python bench/evidence.py table                     rewrite the tables of README.md and docs/results.md

``search``, ``run`` and ``all`` stop after --minutes and then exit with code 3; the same command continues where it stopped, so
``while python bench/evidence.py all; test $? = 3; do :; done`` makes everything. Several processes may run at once: each takes
work that no other has taken. What is recorded is not done again.
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

from headkd_ray.cli import user_errors
from headkd_ray.errors import JobError
from headkd_ray.prepare import prepare, prepare_parts

JOBS = ROOT / "jobs" / "evidence"


def order() -> Order:
    """Return, for each tier, the rows in table order and what each is compared with."""
    return {tier: {name: row.against for name, row in rows.items()} for tier, rows in ROWS.items()}


# --- the command ---


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 3 if time ran out before everything was done."""
    with user_errors():
        options = _parser().parse_args(arguments)
        try:
            _do(options)
        except OutOfTimeError:
            print(f"the time limit of {options.minutes:g} minutes is reached; run the same command again to continue")
            return 3
    return 0


def _do(options: argparse.Namespace) -> None:
    if options.command == "prepare":
        for split in ("train", "val", "test"):
            out = str(options.data / split)
            meta = prepare(getattr(options, split), options.images, out, shard_images=128).meta
            print(f"{out}: {meta.images} images, {meta.boxes} boxes, {len(meta.classes)} classes")
        # For the rows with few labels: the training photos in two parts, near-duplicates in one of them.
        prepare_parts(options.train, options.images, str(options.data / "halves"), [0.5, 0.5], shard_images=128)
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
        "search": commands.add_parser("search", help="choose the learning rates of rows (default: all)"),
        "run": commands.add_parser("run", help="train rows"),
        "all": commands.add_parser("all", help="train all rows"),
    }
    for name, command in running.items():
        if name != "all":
            command.add_argument("rows", nargs="*" if name == "search" else "+", metavar="ROW")
        if name != "search":
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED")
        command.add_argument("--minutes", type=float, default=9.0, help="time limit in minutes (default %(default)s)")
    commands.add_parser("table", help="write the tables of README.md and docs/results.md")
    commands.add_parser("forget", help="delete rows, after a bug").add_argument("rows", nargs="+", metavar="ROW")
    return parser


if __name__ == "__main__":
    sys.exit(main())
