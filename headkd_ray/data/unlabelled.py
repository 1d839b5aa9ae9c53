"""Read images without labels, for ``prepare --unlabelled``: those of a folder, or those that a COCO JSON lists."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headkd_ray.data.checked_split import Images
from headkd_ray.data.coco_json import coco_records
from headkd_ray.data.file_names import FileNames
from headkd_ray.data.image_lists import image_files
from headkd_ray.data.part import Annotations, Part, Reader
from headkd_ray.data.problems import Problems
from headkd_ray.data.records import ImageRecords
from headkd_ray.errors import DataError
from headkd_ray.storage import Folder


@dataclass(frozen=True)
class FolderReader(Reader):
    """Reads the images of a folder and its subfolders, numbered from 1 in the order of their names."""

    folder: Folder

    def read(self, problems: Problems) -> Part:
        warnings: list[str] = []
        paths = image_files(self.folder, warnings)
        names = [path.removeprefix(f"{self.folder.path.rstrip('/')}/") for path in paths]
        if not names:
            problems.add("holds no images; check the path", self.folder.uri)
        images = Images(np.arange(1, len(names) + 1), names, np.zeros((len(names), 2), dtype=np.int32))
        part = _part(self.folder.uri, images, self.folder, warnings, set())
        part.upright, part.written_in = True, "folder"
        return part


@dataclass(frozen=True)
class ImageListReader(Reader):
    """Reads the images of a COCO JSON, with their ids; its annotations are not used."""

    uri: str
    folder: Folder

    def read(self, problems: Problems) -> Part:
        images, annotations = ImageRecords(self.uri, problems), 0
        for key, item in coco_records(self.uri, needed=("images",)):
            if key == "images":
                images.add(item)
            annotations += key == "annotations"
        warnings = [f"{self.uri}: its {annotations} annotations are not used (--unlabelled)"] if annotations else []
        return _part(self.uri, images.images(), self.folder, warnings, images.invalid)


def _part(name: str, images: Images, folder: Folder, warnings: list[str], invalid: set[int]) -> Part:
    return Part(
        name=name,
        images=images,
        categories={},
        annotations=Annotations().columns(),
        where=lambda row: name,
        folder=folder,
        names=FileNames(folder),
        invalid_images=invalid,
        warnings=warnings,
    )


def unlabelled_readers(places: list[str], images: list[str]) -> list[Reader]:
    """Return a reader for each source: a folder of images, or a COCO JSON with the folder of its images.

    Args:
        places: folders, or COCO JSONs; paths or URIs.
        images: folders of the JSONs' images: none, one for all, or one for each.

    Raises:
        DataError: a place is neither, or its folder is missing.
    """
    if len(images) not in (0, 1, len(places)):
        raise DataError(f"--images: {len(images)} folders for {len(places)} sources; give one for all, or one for each")
    folders: list[str | None] = [*images] or [None]
    folders *= len(places) // len(folders)
    return [_reader(place, folder) for place, folder in zip(places, folders, strict=True)]


def _reader(place: str, images: str | None) -> Reader:
    if place.lower().endswith(".json"):
        if images is None:
            raise DataError(
                f"{place}: give the folder of its images, too: prepare {place} IMAGES_DIR --unlabelled --out OUT_DIR"
            )
        return ImageListReader(place, Folder.open(images, DataError))
    folder = Folder.open(place, DataError)
    if images is not None or not folder.exists:
        raise DataError(
            f"{place}: --unlabelled takes a folder of images, or a COCO JSON and the folder of its images"
            + ("" if folder.exists else "; there is no such folder")
        )
    return FolderReader(folder)
