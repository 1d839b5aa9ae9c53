"""Prepare splits: read and check their annotations, and pack them with their images into shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from headkd_ray.data.checked_split import CheckedSplit
from headkd_ray.data.checking import Checked, CheckOptions, checked
from headkd_ray.data.dividing import check_fractions, divided
from headkd_ray.data.images import FULL_RANGE
from headkd_ray.data.near_duplicates import Fingerprint, fingerprint
from headkd_ray.data.photos import Exif
from headkd_ray.data.shard_writer import pack
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.sources import SourceOptions, readers
from headkd_ray.data.stored import file_sha256
from headkd_ray.data.unlabelled import unlabelled_readers
from headkd_ray.data.voc import Pixels
from headkd_ray.errors import DataError
from headkd_ray.storage import Folder


def prepare_split(
    annotations: str | Sequence[str],
    images: str | Sequence[str] | None,
    out_uri: str,
    *,
    split: str | None = None,
    classes: str | None = None,
    voc_pixels: Pixels | None = None,
    fix_boxes: bool = False,
    exif: Exif | None = None,
    workers: int | None = None,
    write_coco: str | None = None,
    unlabelled: bool = False,
    **options: Any,
) -> ShardSet:
    """Prepare a split; all places are paths or URIs.

    Args:
        annotations: COCO JSON, data.yaml of a YOLO data set, or folder in Pascal VOC's format; or several of them. With
            ``unlabelled`` folders of images, or COCO JSONs.
        images: folder of the images that a JSON names; or several, one for each of the ``annotations``. None = they say it.
        split: split of a data.yaml, or list in Pascal VOC's ImageSets/Main; None = all images.
        classes: classes of Pascal VOC, a text file or a prepared split; None = those that are found.
        voc_pixels: what Pascal VOC's coordinates are; None = as the numbers imply.
        fix_boxes: clip or drop unusable boxes instead of refusing the split.
        exif: apply or ignore EXIF orientation; None = as the annotations' sizes or format imply.
        workers: threads that read and check images; None = one per CPU.
        write_coco: file to which the split is also written as a COCO JSON; one with another content is not overwritten.
        unlabelled: prepare images without labels, for ``data.unlabelled``.
        options: passed on to :func:`pack`.

    Returns:
        The opened split. If the folder already holds this very split, it is only checked, and damaged files are made again.

    Raises:
        DataError: the annotations or the images have problems, all of which are listed; or as :func:`pack`.
    """
    check_range(options.get("value_range"))
    if unlabelled:
        others = {"--split": split, "--classes": classes, "--voc-pixels": voc_pixels, "--fix-boxes": fix_boxes or None}
        if given := [name for name, value in others.items() if value is not None]:
            raise DataError(f"--unlabelled: {', '.join(given)} is about labels, of which there are none; leave it out")
        sources = unlabelled_readers(_several(annotations), _several(images))
    else:
        sources = readers(_several(annotations), _several(images), SourceOptions(split, False, classes, voc_pixels, workers))
    found = checked(sources, CheckOptions(fix_boxes, exif, workers, labelled=not unlabelled))
    if write_coco is not None:
        write_coco_json(found.split, write_coco, _several(annotations), overwrite=options.get("overwrite", False))
    return pack(found, out_uri, exif=exif, workers=workers, **options)


def prepare_splits(
    annotations: str | Sequence[str],
    images: str | Sequence[str] | None,
    out_uri: str,
    fractions: Sequence[float],
    *,
    group_by: str | None = None,
    seed: int = 0,
    classes: str | None = None,
    voc_pixels: Pixels | None = None,
    fix_boxes: bool = False,
    exif: Exif | None = None,
    workers: int | None = None,
    write_coco: str | None = None,
    **options: Any,
) -> dict[str, ShardSet]:
    """Divide all images into the parts train, val and test of ``out_uri``, and prepare each; returns them by name.

    Args:
        fractions: two or three, for train, val and test.
        group_by: regular expression; images whose names it matches with the same text (of its first group) stay together.
        seed: of the random division.

    Everything else is as for :func:`prepare_split`, which see.
    """
    check_range(options.get("value_range"))
    check_fractions(fractions, group_by)
    source = SourceOptions(None, True, classes, voc_pixels, workers)
    found = checked(readers(_several(annotations), _several(images), source), CheckOptions(fix_boxes, exif, workers))
    if write_coco is not None:
        write_coco_json(found.split, write_coco, _several(annotations), overwrite=options.get("overwrite", False))
    prints = fingerprints(found, workers)
    parts = divided(found.split, fractions, prints, group_by=group_by, seed=seed)
    packed, errors = {}, []
    for name, split in parts.items():
        try:
            place = (Folder.open(out_uri, DataError) / name).uri
            packed[name] = pack(found._replace(split=split), place, exif=exif, workers=workers, **options)
        except DataError as error:
            errors.append(error)
    if errors:
        raise DataError([problem for error in errors for problem in error.problems], errors[0].headline)
    return packed


def fingerprints(found: Checked, workers: int | None) -> list[Fingerprint | None]:
    """Return the fingerprint of each image; None for one that cannot be read, which packing will report."""
    folder = found.folder

    def of(name: str) -> Fingerprint | None:
        try:
            return None if folder is None else fingerprint(folder.read(name))
        except (OSError, ValueError):
            return None

    with ThreadPoolExecutor(workers, thread_name_prefix="headkd-look") as pool:
        return list(pool.map(of, found.split.images.names))


def _several(places: str | Sequence[str] | None) -> list[str]:
    return [places] if isinstance(places, str) else [*(places or ())]


def check_range(value_range: tuple[int, int] | None) -> None:
    """Raise DataError if the range of 16-bit images' values is not one."""
    low, high = value_range or FULL_RANGE
    if not FULL_RANGE[0] <= low < high <= FULL_RANGE[1]:
        raise DataError(f"--range {low} {high}: give two ascending values, from {FULL_RANGE[0]} to {FULL_RANGE[1]}")


def write_coco_json(split: CheckedSplit, uri: str, sources: Sequence[str], *, overwrite: bool) -> None:
    """Write the split as a COCO JSON; file names are relative to the images' folder.

    Raises:
        DataError: the file is one of the ``sources``, or is there with another content and not to be overwritten; or it cannot
            be written.
    """
    folder, name = Folder.of_file(uri, DataError)
    if any(folder.at(name) == Folder.open(source, DataError).path for source in sources):
        raise DataError(f"--write-coco {uri}: is also what is read; choose another file")
    digest = hashlib.sha256()
    for piece in split.coco_json():
        digest.update(piece)
    try:
        if (there := file_sha256(folder, name)) == digest.hexdigest():
            return
        if there is not None and not overwrite:
            raise DataError(f"--write-coco {uri}: is there with another content; choose another file, or give --overwrite")
        folder.create()
        folder.write(name, split.coco_json())
    except OSError as error:
        raise DataError(f"{uri}: cannot be written ({error}); choose another file for --write-coco") from error
