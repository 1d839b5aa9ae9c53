"""Read a data set in Pascal VOC's layout: an XML file for each image, in a folder of its own or beside the photos."""

from __future__ import annotations

import posixpath
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from headkd_ray.data.annotation_keys import FlagError, Flags
from headkd_ray.data.box_checks import plain, shortly
from headkd_ray.data.box_forms import larger_images
from headkd_ray.data.checked_split import Images
from headkd_ray.data.class_lists import listed
from headkd_ray.data.file_names import FileNames
from headkd_ray.data.image_lists import counted, is_image, lines_of
from headkd_ray.data.part import Annotations, Part, Reader
from headkd_ray.data.problems import Problems
from headkd_ray.data.voc_xml import LARGEST, VocImage, XmlError, parse_voc
from headkd_ray.errors import DataError, StorageError
from headkd_ray.storage import Folder

Pixels = Literal["inclusive", "edges"]
"""What xmin and xmax are: the first and last pixel of the box, counted from 1, as in Pascal VOC itself; or the places of its
edges, where 0 is the photo's left border, as labelImg, CVAT, Label Studio and Roboflow write them."""

XML_FOLDER, IMAGE_FOLDER, SETS = "Annotations", "JPEGImages", "ImageSets/Main"
NO_PHOTO = "no photo of this name; check IMAGES_DIR, or remove the XML"
NO_CLASS = "object of a class that is not in --classes; correct it, or add the class"


@dataclass(frozen=True)
class VocReader(Reader):
    """Reads a folder of XML files."""

    folder: Folder
    """The data set's folder, which has a folder Annotations, or the folder of the XML files."""
    photos: Folder | None = None
    """The images' folder; None = the data set's JPEGImages, or where the XML files are."""
    split: str | None = None
    """Name of a list in ImageSets/Main; None = all XML files."""
    classes: tuple[str, ...] | None = None
    """Class names in their order; None = those that are found, sorted."""
    pixels: Pixels | None = None
    """What the coordinates are; None = as the numbers imply."""
    workers: int | None = None
    """Threads that read XML files; None = one per CPU."""

    def read(self, problems: Problems) -> Part:
        """Read the XML files, find the photo of each, and turn the coordinates into x, y, width and height."""
        xml = self.folder / XML_FOLDER if (self.folder / XML_FOLDER).exists else self.folder
        photos = self.photos or (self.folder / IMAGE_FOLDER if (self.folder / IMAGE_FOLDER).exists else xml)
        files = self._files(xml)
        reading = _Reading(problems)
        found = [(name, image) for name, image in self._parsed(xml, files, reading) if image is not None]
        matches = _Matches(photos, [(name, image.file_name) for name, image in found])
        for row, (name, image) in enumerate(found):
            if matches.names[row] is None:
                shown = f", <filename> {image.file_name!r}" if image.file_name else ""
                problems.add(NO_PHOTO, f"{xml.named(name)}{shown}")
            reading.add(row + 1, xml.named(name), image, self.classes)
        classes = self.classes or tuple(sorted(reading.names))
        columns = reading.annotations.columns()
        number = {name: k for k, name in enumerate(classes, start=1)}
        ids = np.array([number.get(name, 0) for name in reading.names], dtype=np.int64)
        columns.category = ids[columns.category] if len(ids) else columns.category
        origin, told = self._origin(columns.bbox)
        columns.bbox[:, 2:] += origin - columns.bbox[:, :2]  # inclusive: the last pixel belongs to the box
        columns.bbox[:, :2] -= origin
        lost = [row + 1 for row, name in enumerate(matches.names) if name is None]
        warnings = [*matches.warnings(listed=self.split is not None), *told, *reading.flags.warnings()]
        empty = len(found) - len(np.unique(columns.image))
        if empty:
            warnings.append(f"{empty} of {len(found)} images are background, without objects")
        return Part(
            name=self.folder.uri,
            images=Images(
                np.arange(1, len(found) + 1),
                [name or f"{posixpath.splitext(file)[0]}.jpg" for name, (file, _) in zip(matches.names, found, strict=True)],
                np.array([image.size for _, image in found], dtype=np.int32).reshape(-1, 2),
            ),
            categories=dict(enumerate(classes, start=1)),
            annotations=columns,
            where=lambda row: f"{xml.named(found[int(columns.image[row]) - 1][0])}: object {reading.positions[row]}",
            folder=photos,
            misread=larger_images,
            written=lambda box, size: plain([*(box[:2] + origin), *(box[:2] + box[2:])]),
            written_in="XML",
            invalid_images=set(lost),
            warnings=warnings,
        )

    def _files(self, xml: Folder) -> list[str]:
        """Return the paths of the XML files, within their folder."""
        if self.split is None:
            files = [name for name in xml.files() if name.lower().endswith(".xml")]
            if not files:
                raise DataError(f"{xml.uri}: no XML files; check the folder")
            return files
        place = self.folder / SETS
        if not place.has(f"{self.split}.txt"):
            there = [posixpath.splitext(name)[0] for name in (place.names() if place.exists else []) if name.endswith(".txt")]
            raise DataError(
                f"{place.named(self.split)}.txt: no such list of images; found {listed(sorted(there)) or 'none'}"
                + (f"; for the folder of that name give {own.uri}" if (own := self.folder / self.split).exists else "")
            )
        lines = [line.split() for line in lines_of(place, f"{self.split}.txt")]
        if any(len(line) == 2 and line[1] in ("1", "-1", "0") for line in lines):
            raise DataError(
                f"{place.named(self.split)}.txt: lists the images of one class; choose a list of all, such as train"
            )
        return [f"{' '.join(line)}.xml" for line in lines]

    def _parsed(self, xml: Folder, files: Sequence[str], reading: _Reading) -> Iterator[tuple[str, VocImage | None]]:
        """Yield each file's name and content; None for one that cannot be used, which is a problem."""

        def content(name: str) -> VocImage | tuple[str, str]:
            try:
                with xml.open_file(name) as file:
                    return parse_voc(file.read(LARGEST + 1))
            except XmlError as error:
                return str(error), ""
            except FileNotFoundError:
                return "no such file; correct the list in ImageSets/Main", ""
            except (OSError, StorageError) as error:
                return "cannot be read; check access", f", {error}"

        with ThreadPoolExecutor(self.workers, thread_name_prefix="headkd-xml") as pool:
            for name, image in zip(files, pool.map(content, files), strict=True):
                if isinstance(image, tuple):
                    reading.problems.add(image[0], xml.named(name) + image[1])
                    yield name, None
                else:
                    yield name, image

    def _origin(self, corners: np.ndarray) -> tuple[int, list[str]]:
        """Return 1 if pixels are counted from 1 and the last one belongs to the box, else 0; and what to say about it."""
        if self.pixels is not None:
            return int(self.pixels == "inclusive"), []
        zeros = int((corners[:, :2] < 1).any(1).sum())
        fractions = int((corners % 1 != 0).any(1).sum())
        if zeros or 2 * fractions > len(corners):
            why = f"{zeros} of {len(corners)} boxes start at 0" if zeros else f"{fractions} of {len(corners)} have fractions"
            return 0, [f"coordinates are taken as edges, from 0 ({why}); give --voc-pixels inclusive if they are pixels from 1"]
        return 1, [
            "coordinates are taken as Pascal VOC's own, first and last pixel counted from 1; give --voc-pixels edges if they "
            "are edges counted from 0, as labelImg, CVAT, Label Studio and Roboflow write them (boxes differ by a pixel)"
        ]


class _Reading:
    """Collects the objects of all files."""

    def __init__(self, problems: Problems) -> None:
        self.problems, self.annotations, self.positions = problems, Annotations(), array("i")
        self.flags = Flags(marked="<difficult>1</difficult>", difficult_is_ignored=True)
        self.names: dict[str, int] = {}
        """Class names by the number that stands for them in the columns."""

    def add(self, image_id: int, where: str, image: VocImage, classes: tuple[str, ...] | None) -> None:
        """Add the objects of an image, with corners instead of boxes, and record their problems."""
        for position, each in enumerate(image.objects, start=1):
            place = f"{where}: object {position}"
            if isinstance(each, XmlError):
                self.problems.add(str(each), place)
                continue
            if classes is not None and each.name not in classes:
                self.problems.add(NO_CLASS, f"{place}, {each.name!r}")
                continue
            try:
                ignored = self.flags.crowd(each.flags)
            except FlagError as error:
                self.problems.add(f"<{error.key}> must be 0 or 1", f"{place}, {shortly(error.value)}")
                continue
            category = self.names.setdefault(each.name, len(self.names))
            self.annotations.add(len(self.annotations) + 1, image_id, category, each.corners, None, ignored)
            self.positions.append(position)


class _Matches:
    """The photo of each XML file: the one of its own name, or else the one that <filename> names."""

    def __init__(self, photos: Folder, files: Sequence[tuple[str, str]]) -> None:
        if not photos.exists:
            raise DataError(f"{photos.uri}: no such folder; give the folder of the photos: prepare XML_FOLDER IMAGES_DIR")
        self._files = [name for name in photos.files() if is_image(name)]
        by_stem: dict[str, list[str]] = {}
        for name in self._files:
            by_stem.setdefault(posixpath.splitext(name)[0], []).append(name)
        known = set(self._files)
        self._renamed: list[tuple[str, str]] = []
        """XML files whose <filename> is another one than the photo that was taken, and that photo."""
        self.names: list[str | None] = []
        """Path of each file's photo; None if there is none."""
        near = FileNames(photos).near([given for _, given in files if given and given not in known])
        for xml, given in files:
            own = by_stem.get(posixpath.splitext(xml)[0], [])
            found = given if given in own else own[0] if len(own) == 1 else None
            if found is None:
                found = given if given in known else near.get(given)
            elif given and posixpath.basename(given.replace("\\", "/")) != posixpath.basename(found):
                self._renamed.append((xml, found))
            self.names.append(found)

    def warnings(self, listed: bool) -> list[str]:
        """Say which photos were taken under another name, and how many have no XML file, unless these are ``listed``."""
        lines = []
        if self._renamed:
            xml, found = self._renamed[0]
            lines.append(
                f"<filename> is not the photo of the XML file's own name, which is taken, in {len(self._renamed)} of "
                f"{len(self.names)} XML files, for example {found!r} for {xml!r}"
            )
        left = len(set(self._files) - set(self.names))
        if left and not listed:
            lines.append(
                f"{counted(left, 'photo')} without an XML file and left out; an XML file without objects makes it background"
            )
        return lines
