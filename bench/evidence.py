"""The evidence: HEAD's rows beside their own baselines on real photos, with seeds. ``ROWS`` below is the list.

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
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from evidence_plan import Bench, Row
from evidence_run import ROOT, OutOfTimeError, forget, run, work
from evidence_search import searches
from evidence_tables import Order, write_tables

from headkd_ray.doors import user_errors
from headkd_ray.errors import JobError
from headkd_ray.prepare import prepare

ROI_HEAD = "{{fc_channels: 256, pool: 5, finest_scale: 28, sampler: {{size: {}}}}}"
"""The RoI head of the micro teacher (a test compares them), with a number of RoIs an image."""
FCOS = "{head: {convs: 2, channels: 32, norm_groups: 8, tower_std: null, regress_ranges: [32, 64, 128, 256]}}"
RCNN = f"{{head: {ROI_HEAD.format(64)}}}"
"""TF-HEAD's assistants, with the research branch's weights."""
TF_HEAD = "method=tf_head distill.ckd_epochs=8"
"""CKD stops at the first drop of the learning rate."""
VIEWS = "data.views=4 data.view_seed=0"
"""Four views of each image, the same for all seeds, so that these share a cache."""


def _micro() -> Iterator[tuple[str, Row]]:
    alone, fcos = ("baseline",), ("fcos_baseline",)
    yield "teacher", Row("teacher")
    yield "retina_teacher", Row("retina_teacher")
    # The paper's ladder, RoIs of the student's own.
    yield "baseline", Row("retinanet")
    yield "assist", Row("retinanet", f"method=assist 'distill.assistant={ROI_HEAD.format(64)}'", alone)
    yield "copy_only", Row("retinanet", "method=copy_only", alone, "teacher")
    yield "akd", Row("retinanet", "method=akd", alone, "teacher")
    yield "head", Row("retinanet", "method=head", (*alone, "akd"), "teacher")
    # No box of these small images is P6's or P7's: nothing bounds their features, and these would be nearly all of the loss.
    yield "fitnet", Row("retinanet", "method=fitnet distill.fitnet_levels=3", alone, "retina_teacher")
    # Without a teacher.
    yield "tf_head_fcos", Row("retinanet", f"{TF_HEAD} 'distill.assistants.fcos={FCOS}'", alone, lr_of="tf_head")
    yield "tf_head_rcnn", Row("retinanet", f"{TF_HEAD} 'distill.assistants.rcnn={RCNN}'", alone, lr_of="tf_head")
    both = f"{TF_HEAD} 'distill.assistants.fcos={FCOS}' 'distill.assistants.rcnn={RCNN}'"
    yield "tf_head", Row("retinanet", both, (*alone, "tf_head_noes"))
    yield "tf_head_noes", Row("retinanet", f"{both} distill.ckd_epochs=null", alone, lr_of="tf_head")
    # The FCOS student; the research branch halves its CKD, and stops it in the last epoch.
    yield "fcos_baseline", Row("fcos")
    yield "fcos_head", Row("fcos", "method=head distill.ckd_weight=1.0 distill.ckd_epochs=11", fcos, "teacher")
    # The teacher off the training step: equal views and equal numbers of RoIs.
    yield "baseline_views", Row("retinanet", VIEWS, lr_of="baseline")
    for rois in (64, 128, 256):
        own, theirs = f"head_inline_{rois}", f"head_rois_{rois}"
        budget = f"method=head {VIEWS} distill.roi_budget={rois}"
        sampler = f"'distill.assistant={ROI_HEAD.format(rois)}'"
        yield own, Row("retinanet", f"{budget} {sampler}", ("baseline_views",), "teacher", "head")
        yield theirs, Row("retinanet", f"{budget} distill.rois=teacher", ("baseline_views", own), "teacher", "head")
        for dtype in ("fp16", "int8"):
            kept = f"{budget} distill.rois=teacher teacher.placement=cache teacher.cache.dtype={dtype}"
            yield f"head_cache_{rois}_{dtype}", Row("retinanet", kept, ("baseline_views", own, theirs), "teacher", "head")


ROWS: dict[str, dict[str, Row]] = {"micro": dict(_micro())}
"""Tier -> rows, in the order in which they are made and shown."""
JOBS = ROOT / "jobs" / "evidence"


def order() -> Order:
    """What the tables need to know about the rows."""
    return {tier: {name: row.against for name, row in rows.items()} for tier, rows in ROWS.items()}


# --- the command ---


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code: 3 = out of time, there is more to do."""
    options = _parser().parse_args(arguments)
    with user_errors():
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
