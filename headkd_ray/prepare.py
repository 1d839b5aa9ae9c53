"""Prepare a COCO-format split for training or evaluation.

    python -m headkd_ray.prepare instances_train2017.json train2017/ --out data/coco_train

All three locations are local paths or URIs (s3://, gs://, hdfs://, or any that fsspec supports). The JSON and every image are
checked, and all problems are reported together. After an interruption the same command continues; for a finished split, it only
checks that the shards are intact and the images unchanged.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from headkd_ray.cli import callable_as, command_parser, positive, user_errors
from headkd_ray.data.images import MAX_PIXELS
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.shards import META, ShardSet
from headkd_ray.report.terminal import Terminal
from headkd_ray.text import printable

SHOWN = 20
"""Maximum number of fixes that are printed; meta.json lists all."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    with user_errors():
        options = _parser().parse_args(arguments)
        shards = prepare(
            options.json,
            options.images,
            options.out,
            shard_images=options.shard_images,
            row_group=options.row_group,
            workers=options.workers,
            fix_boxes=options.fix_boxes,
            exif=options.exif,
            value_range=options.range and tuple(options.range),
            max_pixels=10**6 * options.max_megapixels if options.max_megapixels else MAX_PIXELS,
            overwrite=options.overwrite,
        )
    meta = shards.meta
    boxes = f"{meta.boxes} boxes" + (f" and {meta.crowds} crowds" if meta.crowds else "")
    print(f"{printable(options.out)}: {meta.images} images, {boxes}, {len(meta.classes)} classes, {len(meta.shards)} shards")
    return 0


def prepare(json_uri: str, images_uri: str, out_uri: str, **options: Any) -> ShardSet:
    """Run ``data.packing.prepare_split`` with a progress bar, and print its warnings and fixes, all on standard error.

    ``options`` are passed on to it.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task("reading annotations", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, description="checking and packing images", completed=done, total=total)

        shards = prepare_split(json_uri, images_uri, out_uri, progress=show, **options)
    _tell(shards, out_uri)
    return shards


def _tell(shards: ShardSet, out_uri: str) -> None:
    meta = shards.meta
    for warning in meta.warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    for line in meta.fixes[:SHOWN]:
        print(f"fixed: {printable(line)}", file=sys.stderr)
    if len(meta.fixes) > SHOWN:
        print(f"… {len(meta.fixes)} fixes in total, listed in {printable(shards.folder.named(META))}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("prepare", __doc__)
    parser.add_argument("json", metavar="COCO.json", help="annotations in COCO's detection format")
    parser.add_argument("images", metavar="IMAGES_DIR", help="folder that the JSON's file names are relative to")
    parser.add_argument("--out", required=True, metavar="OUT_DIR", help="folder to write")
    parser.add_argument("--shard-images", type=positive, default=512, metavar="N", help="images per shard file (default 512)")
    parser.add_argument("--row-group", type=positive, default=16, metavar="N", help="images read together (default 16)")
    parser.add_argument("--workers", type=positive, metavar="N", help="threads (default: one per CPU; more for remote images)")
    parser.add_argument("--fix-boxes", action="store_true", help="clip or drop unusable boxes, and list them")
    parser.add_argument(
        "--exif",
        choices=("apply", "ignore"),
        help="turn images upright by their EXIF orientation, or use them as stored (default: whichever fits the JSON's sizes)",
    )
    parser.add_argument(
        "--range",
        type=int,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values of 16-bit images that become black and white, for example 0 4095 (default 0 65535)",
    )
    parser.add_argument("--max-megapixels", type=positive, metavar="N", help="refuse larger images (default 178)")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished split in OUT_DIR")
    return parser


callable_as(__name__, prepare)

if __name__ == "__main__":
    sys.exit(main())
