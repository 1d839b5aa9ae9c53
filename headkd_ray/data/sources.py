"""Recognise the format of each annotated source that a user names, and make its reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headkd_ray.data.class_lists import listed
from headkd_ray.data.coco import CocoReader
from headkd_ray.data.image_lists import lines_of
from headkd_ray.data.meta import Meta
from headkd_ray.data.part import Reader
from headkd_ray.data.voc import XML_FOLDER, Pixels, VocReader
from headkd_ray.data.yolo import YoloReader
from headkd_ray.data.yolo_yaml import NAME_LISTS
from headkd_ray.errors import DataError
from headkd_ray.storage import Folder

ROBOFLOW = "_annotations.coco.json"
"""Name of the JSON that Roboflow writes beside the images."""
YAML = "data.yaml"
FILES = (".json", ".yaml", ".yml")
"""Suffixes of files with annotations, in lower case."""


@dataclass(frozen=True)
class SourceOptions:
    """How sources are read, as far as that depends on their format."""

    split: str | None = None
    """Split of a data.yaml, or list in ImageSets/Main; None = all images."""
    joined: bool = False
    """Whether several splits of a data.yaml may be read as one."""
    classes: str | None = None
    """Classes of Pascal VOC: a text file with a name a line, or a prepared split; None = those that are found."""
    voc_pixels: Pixels | None = None
    """What Pascal VOC's coordinates are; None = as the numbers imply."""
    workers: int | None = None
    """Threads that read small files; None = one per CPU."""


def readers(annotations: Sequence[str], images: Sequence[str], options: SourceOptions) -> list[Reader]:
    """Return a reader for each source.

    Args:
        annotations: COCO JSONs, data.yaml files and folders in Pascal VOC's format; paths or URIs.
        images: folders of their images: none, one for all, or one for each.

    Raises:
        DataError: a source is of no known format, or folders or options do not fit the sources.
    """
    if len(images) not in (0, 1, len(annotations)):
        raise DataError(
            f"--images: {len(images)} folders for {len(annotations)} ANNOTATIONS; give one for all, or one for each"
        )
    folders: list[str | None] = [*images] or [None]
    folders *= len(annotations) // len(folders)
    classes = None if options.classes is None else read_classes(options.classes)
    found = [_reader(place, folder, options, classes) for place, folder in zip(annotations, folders, strict=True)]
    kinds = {type(reader) for reader in found}
    if options.split is not None and CocoReader in kinds:
        raise DataError(f"--split {options.split}: a COCO JSON is one split; --split FRACTIONS divides it")
    if VocReader not in kinds and (options.classes is not None or options.voc_pixels is not None):
        raise DataError("--classes and --voc-pixels are for Pascal VOC; COCO JSONs and data.yaml list their classes themselves")
    return found


def is_source(place: str, beside: str) -> bool:
    """Return whether a place holds annotations and is not the images' folder of ``beside``, as far as names show it."""
    return place.lower().endswith(FILES) or (
        not beside.lower().endswith(".json") and (Folder.open(place, DataError) / XML_FOLDER).exists
    )


def _reader(place: str, images: str | None, options: SourceOptions, classes: tuple[str, ...] | None) -> Reader:
    folder = Folder.open(place, DataError)
    photos = None if images is None else Folder.open(images, DataError)
    if not place.lower().endswith(FILES) and folder.exists:
        if folder.has(YAML):
            place = (folder / YAML).uri
        elif folder.has(ROBOFLOW):
            place, photos = (folder / ROBOFLOW).uri, photos or folder
        elif (folder / XML_FOLDER).exists or any(name.lower().endswith(".xml") for name in folder.files()):
            return VocReader(folder, photos, options.split, classes, options.voc_pixels, options.workers)
        elif names := next(filter(folder.has, NAME_LISTS), None):
            place = (folder / names).uri
        else:
            inside = [name for name, is_folder in folder.entries() if is_folder and _has_source(folder / name)]
            raise DataError(
                f"{place}: is a folder without {YAML}, {ROBOFLOW} or XML files; give a COCO JSON and the folder of its images, "
                "a data.yaml (YOLO), or a folder in Pascal VOC's format"
                + (f"; there are such in it: {listed([(folder / name).uri for name in inside])}" if inside else "")
            )
    if place.lower().endswith((".yaml", ".yml", *NAME_LISTS)):
        if photos is not None:
            raise DataError(f"{place}: names the folders of its images itself; leave out {images}")
        return YoloReader(place, options.split, options.joined, options.workers)
    if photos is None:
        raise DataError(f"{place}: give the folder of its images, too: prepare {place} IMAGES_DIR --out OUT_DIR")
    return CocoReader(place, photos)


def _has_source(folder: Folder) -> bool:
    return any(map(folder.has, (YAML, ROBOFLOW, *NAME_LISTS)))


def read_classes(place: str) -> tuple[str, ...]:
    """Return class names from a text file with one a line, or from a prepared split. Raises DataError."""
    from headkd_ray.data.shards import META

    folder = Folder.open(place, DataError)
    if folder.has(META):
        return Meta.from_json(folder.read(META), folder.named(META)).classes
    names = lines_of(*Folder.of_file(place, DataError))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise DataError(
            f"{place}: {f'{listed(twice)} stands there twice' if twice else 'no names'}; write each class on a line"
        )
    return tuple(names)
