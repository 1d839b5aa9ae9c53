"""Prepare a split for training or evaluation, from COCO JSON, a YOLO data set or Pascal VOC XML.

    python -m headkd_ray.prepare instances_train2017.json train2017/ --out data/coco/train
    python -m headkd_ray.prepare data.yaml --split train --out data/mine/train
    python -m headkd_ray.prepare VOC2012 --split train --out data/voc/train
    python -m headkd_ray.prepare all.json photos/ --split 0.8 0.1 0.1 --out data/mine
    python -m headkd_ray.prepare more_photos/ --unlabelled --out data/mine/unlabelled

All locations are local paths or URIs (s3://, gs://, hdfs://, or any that fsspec supports). All annotations and every image are
checked, and all problems are reported together. After an interruption the same command continues; for a finished split, it only
checks that the shards are intact and the images unchanged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

from headkd_ray.cli import callable_as, command_parser, positive, user_errors
from headkd_ray.data.images import MAX_PIXELS
from headkd_ray.data.packing import prepare_split, prepare_splits
from headkd_ray.data.shards import META, ShardSet
from headkd_ray.data.sources import is_source
from headkd_ray.data.voc import Pixels
from headkd_ray.errors import DataError
from headkd_ray.report.terminal import progress_bar
from headkd_ray.text import printable

SHOWN = 20
"""Maximum number of fixes that are printed; meta.json lists all."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    with user_errors():
        options = _parser().parse_args(arguments)
        annotations, images = _places(options.places, options.images)
        name, fractions = _split(options.split)
        common = {
            "classes": options.classes,
            "voc_pixels": options.voc_pixels,
            "fix_boxes": options.fix_boxes,
            "exif": None if options.exif == "auto" else options.exif,
            "workers": options.workers,
            "write_coco": options.write_coco,
            "shard_images": options.shard_images,
            "row_group": options.row_group,
            "value_range": options.range and tuple(options.range),
            "max_pixels": 10**6 * options.max_megapixels if options.max_megapixels else MAX_PIXELS,
            "overwrite": options.overwrite,
        }
        if fractions is None:
            for option in ("group_by", "seed"):
                if getattr(options, option) is not None:
                    raise DataError(f"--{option.replace('_', '-')} is for a division: give it with --split FRACTIONS")
            _say(prepare(annotations, images, options.out, split=name, unlabelled=options.unlabelled, **common), options.out)
        else:
            if options.unlabelled:
                raise DataError("--unlabelled: --split divides by class, and there are no labels; leave out one of the two")
            shares = {"group_by": options.group_by, "seed": options.seed or 0}
            for shards in prepare_parts(annotations, images, options.out, fractions, **shares, **common).values():
                _say(shards, shards.folder.uri)
    return 0


def prepare(annotations: str | Sequence[str], images: str | Sequence[str] | None, out_uri: str, **options: Any) -> ShardSet:
    """Run ``data.packing.prepare_split`` with a progress bar, and print its warnings and fixes, all on standard error.

    ``options`` are passed on to it.
    """
    with _progress() as show:
        shards = prepare_split(annotations, images, out_uri, progress=show, **options)
    _tell(shards)
    return shards


def prepare_parts(
    annotations: str | Sequence[str],
    images: str | Sequence[str] | None,
    out_uri: str,
    fractions: Sequence[float],
    **options: Any,
) -> dict[str, ShardSet]:
    """Run ``data.packing.prepare_splits`` with a progress bar, and print its warnings and fixes, all on standard error."""
    with _progress() as show:
        parts = prepare_splits(annotations, images, out_uri, fractions, progress=show, **options)
    _tell(*parts.values())
    return parts


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar, and give the function that moves it."""
    with progress_bar() as bar:
        task = bar.add_task("reading annotations", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, description="checking and packing images", completed=done, total=total)

        yield show


def _tell(*parts: ShardSet) -> None:
    """Print what the user should know about the splits, each line once."""
    for warning in dict.fromkeys(warning for shards in parts for warning in shards.meta.warnings):
        print(f"warning: {printable(warning)}", file=sys.stderr)
    fixes = parts[0].meta.fixes  # which are of the whole source
    for line in fixes[:SHOWN]:
        print(f"fixed: {printable(line)}", file=sys.stderr)
    if len(fixes) > SHOWN:
        print(f"… {len(fixes)} fixes in total, listed in {printable(parts[0].folder.named(META))}", file=sys.stderr)


def _say(shards: ShardSet, place: str) -> None:
    """Print what was prepared."""
    meta = shards.meta
    boxes = f"{meta.boxes} boxes" + (f" and {meta.crowds} crowds" if meta.crowds else "")
    labels = f"{boxes}, {len(meta.classes)} classes" if meta.classes else "without labels"
    print(f"{printable(place)}: {meta.images} images, {labels}, {len(meta.shards)} shards")


def _places(places: list[str], images: list[str] | None) -> tuple[list[str], list[str]]:
    """Return the annotations and the image folders; without --images, the last of several places is the images' folder."""
    if images is not None or len(places) == 1 or is_source(places[-1], beside=places[0]):
        return places, images or []
    return places[:-1], places[-1:]


def _split(given: list[str] | None) -> tuple[str | None, list[float] | None]:
    """Return the name of a split, or the fractions of a division."""
    if given is None:
        return None, None
    try:
        numbers = [float(text) for text in given]
    except ValueError:
        if len(given) == 1:
            return given[0], None
        raise DataError(
            f"--split {' '.join(given)}: give the name of one split, or fractions for train, val and test; other arguments "
            "belong before --split"
        ) from None
    return None, numbers


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("prepare", __doc__)
    parser.add_argument(
        "places",
        nargs="+",
        metavar="ANNOTATIONS [IMAGES_DIR]",
        help="COCO JSON and the folder that its file names are relative to; data.yaml of a YOLO data set; or a folder in "
        "Pascal VOC's format",
    )
    parser.add_argument("--out", required=True, metavar="OUT_DIR", help="folder to write")
    parser.add_argument(
        "--images",
        action="append",
        metavar="DIR",
        help="folder of the images, where several ANNOTATIONS are joined; once for all of them, or once for each, in order",
    )
    parser.add_argument(
        "--unlabelled",
        action="store_true",
        help="prepare images without labels, for data.unlabelled: ANNOTATIONS is a folder of images, or a COCO JSON of which "
        "the images alone are read",
    )
    parser.add_argument(
        "--split",
        nargs="+",
        metavar="NAME",
        help="split of a data.yaml, or list in Pascal VOC's ImageSets/Main; or two or three fractions, such as 0.8 0.1 0.1: "
        "divide all images into OUT_DIR/train, val and test, by class, with near-duplicates together",
    )
    parser.add_argument(
        "--group-by",
        metavar="REGEX",
        help="keep images together whose file names match this with the same text (of its first group, if it has one)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the division (default 0)")
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="class names of Pascal VOC, one a line, or a prepared split (default: those found, sorted)",
    )
    parser.add_argument(
        "--voc-pixels",
        choices=get_args(Pixels),
        help="Pascal VOC's coordinates are first and last pixel, from 1, or edges, from 0 (default: as the numbers imply)",
    )
    parser.add_argument("--write-coco", metavar="FILE", help="also write what was read as a COCO JSON")
    parser.add_argument("--shard-images", type=positive, default=512, metavar="N", help="images per shard file (default 512)")
    parser.add_argument("--row-group", type=positive, default=16, metavar="N", help="images read together (default 16)")
    parser.add_argument("--workers", type=positive, metavar="N", help="threads (default: one per CPU; more for remote images)")
    parser.add_argument("--fix-boxes", action="store_true", help="clip or drop unusable boxes, and list them")
    parser.add_argument(
        "--exif",
        choices=("auto", "apply", "ignore"),
        default="auto",
        help="turn images upright by their EXIF orientation, or use them as stored (default auto: whichever fits the "
        "annotations' sizes; upright for YOLO, and where no sizes are written)",
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
