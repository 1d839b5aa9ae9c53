"""Check the records of a COCO JSON one by one: images, categories and annotations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from headkd_ray.data.annotation_keys import FlagError, Flags
from headkd_ray.data.box_checks import SLACK, BoxCheck, is_box, shortly
from headkd_ray.data.box_forms import misread, unreached
from headkd_ray.data.class_lists import listed
from headkd_ray.data.file_names import FileNames, leaves
from headkd_ray.data.problems import Problems

IGNORED_CLASSES = {"ignore", "ignored", "ignoredregion", "ignoredregions", "ignoreregion", "ignoreregions", "dontcare"}
"""Names, in lower case and letters only, of categories that mark regions to be ignored."""


@dataclass(frozen=True)
class CocoImage:
    """An image record."""

    id: int
    file_name: str
    """Path relative to the images folder, and inside it."""
    width: int
    """Width in pixels, as stored (EXIF orientation ignored)."""
    height: int


@dataclass(frozen=True)
class Annotation:
    """An annotation with a usable box."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    """x, y, width, height in pixels."""
    area: float
    crowd: bool
    """Whether the annotation is a crowd or to be ignored."""


class Records:
    """Reads the records of one JSON and records problems; its results are valid only if there are none."""

    def __init__(self, uri: str, problems: Problems) -> None:
        self.uri, self.problems = uri, problems
        self.fixes: list[str] = []
        """What --fix-boxes changed, one line each."""
        self.warnings: list[str] = []
        """Interpretations of the file that the user should know about."""

    def images(self, records: Iterable[Any], names: FileNames | None) -> tuple[dict[int, CocoImage], set[int]]:
        """Return the valid images by id, and the ids of all images, so that annotations of an invalid one are not errors too.

        Args:
            names: the images' folder, where file names may be spelled differently; None = not looked at.
        """
        images: dict[int, CocoImage] = {}
        named: set[int] = set()
        for where, record in self._each("image", records):
            id_ = _integer(record.get("id"))
            if id_ is None:
                self.problems.add("image record without an integer 'id'; every image needs a unique one", where)
                continue
            named.add(id_)
            name: Any = record.get("file_name")
            width, height = _integer(record.get("width")), _integer(record.get("height"))
            if not _is_text(name):
                self.problems.add(
                    "'file_name' must be a path relative to IMAGES_DIR, in valid Unicode", f"{where}, file_name {shortly(name)}"
                )
            elif width is None or height is None or width < 1 or height < 1:
                found = f"{where}, {shortly(record.get('width'))} x {shortly(record.get('height'))}"
                self.problems.add("'width' and 'height' must be positive integers, the stored image's pixels", found)
            elif id_ in images:
                other = images[id_].file_name
                self.problems.add("duplicate image id; give every image its own", f"{where} ({name}), already used by {other}")
            else:
                images[id_] = CocoImage(id_, name, width, height)
        shared = sum(count for count in Counter(image.file_name for image in images.values()).values() if count > 1)
        if shared:
            self.warnings.append(
                f"{shared} of {len(images)} images share their file with another one, and each has only its own annotations; "
                "if they are the same photo, merge them"
            )
        taken = names.near([image.file_name for image in images.values()]) if names is not None else {}
        if taken:
            example = next(f"{given!r} -> {path!r}" for given, path in taken.items())
            self.warnings.append(
                f"{len(taken)} of {len(images)} file names are spelled differently in the images folder, where their files "
                f"were found, for example {example}"
            )
        for id_, image in images.items():
            if image.file_name in taken:
                images[id_] = CocoImage(id_, taken[image.file_name], image.width, image.height)
            elif leaves(image.file_name):
                found = f"{self.uri}: image {id_}, file_name {image.file_name!r}"
                self.problems.add("'file_name' must be a path relative to IMAGES_DIR that stays in it", found)
        return images, named

    def categories(self, records: list[Any], used: Collection[int]) -> tuple[dict[int, str], set[int]]:
        """Return the class names by category id, and the ids of all categories, including invalid ones.

        A category that is only a parent of others, like the first one of every Roboflow export, is left out.

        Args:
            used: the category ids that annotations use.
        """
        is_root = _root_test(records, used)
        names: set[str] = set()
        categories: dict[int, str] = {}
        named: set[int] = set()
        for where, record in self._each("category", records):
            id_, name = _integer(record.get("id")), record.get("name")
            named |= {id_} if id_ is not None else set()
            if id_ is None or not _is_text(name):
                self.problems.add("a category needs an integer 'id' and a 'name', in valid Unicode", where)
            elif is_root(record):
                self.warnings.append(f"category {id_} ({name!r}) is not a class: no annotation uses it and others are below it")
            elif id_ in categories:
                both = f"{where} ({categories[id_]!r} and {name!r})"
                self.problems.add("duplicate category id; give every category its own", both)
            elif name in names:
                self.problems.add("duplicate category name; merge the two categories or rename one", f"{where} ({name!r})")
            else:
                categories[id_] = name
                names.add(name)
        if not records:
            self.problems.add("no categories; list them under 'categories'", self.uri)
        markers = [name for name in categories.values() if "".join(filter(str.isalpha, name.lower())) in IGNORED_CLASSES]
        if markers:
            self.warnings.append(
                f"{listed(markers)} will be learnt like any other class; if it marks regions to be ignored, give its "
                "annotations the real class and 'ignore': 1, and remove the category"
            )
        return categories, named

    def annotations(
        self,
        records: Iterable[Any],
        images: dict[int, CocoImage],
        image_ids: set[int],
        category_ids: set[int],
        fix_boxes: bool,
    ) -> list[Annotation]:
        """Return the annotations of ``images`` with usable boxes. The ids are those of all records, valid or not."""
        flags, seen = Flags(), set[int]()
        candidates: list[tuple[str, int, CocoImage, int, bool, dict[str, Any]]] = []
        for where, record in self._each("annotation", records):
            id_ = _integer(record.get("id"))
            if id_ is None:
                self.problems.add("annotation without an integer 'id'; every annotation needs a unique one", where)
                continue
            if id_ in seen:
                self.problems.add("duplicate annotation id; give every annotation its own", where)
                continue
            seen.add(id_)
            try:
                out = flags.crowd(record)
            except FlagError as error:
                self.problems.add(f"{error.key!r} must be 0 or 1", f"{where}, {error.key} {shortly(error.value)}")
                continue
            image_id, category_id = _integer(record.get("image_id")), _integer(record.get("category_id"))
            if category_ids and category_id not in category_ids:
                found = f"{where}, category_id {shortly(record.get('category_id'))}"
                self.problems.add("annotation for an unknown category; remove it, or add the category to 'categories'", found)
            if image_id in images and category_id is not None:
                candidates.append((where, id_, images[image_id], category_id, out, record))
            elif image_id not in image_ids:
                found = f"{where}, image_id {shortly(record.get('image_id'))}"
                self.problems.add("annotation for an unknown image; remove it, or add the image to 'images'", found)
        self.warnings += flags.warnings()
        if self._misread([(record.get("bbox"), image, where) for where, _, image, _, _, record in candidates]):
            candidates = [candidate for candidate in candidates if not is_box(candidate[-1].get("bbox"))]
        check = BoxCheck(fix_boxes, self.problems)
        kept = []
        for where, id_, image, category_id, out, record in candidates:
            checked = check(record.get("bbox"), record.get("area"), image, where)
            if checked is not None:
                kept.append(Annotation(id_, image.id, category_id, *checked, crowd=out))
        self.fixes += check.fixes
        flat = sum(annotation.area == 0 for annotation in kept)
        if flat:
            self.warnings.append(
                f"{flat} of {len(kept)} annotations have area 0, so that they count as small objects in evaluation; leave "
                "out 'area' to use width x height"
            )
        return kept

    def _misread(self, boxes: list[tuple[Any, CocoImage, str]]) -> bool:
        """Return whether the boxes, taken together, look like another format than COCO's, and record that as a problem."""
        sound = [entry for entry in boxes if is_box(entry[0])]
        numbers = np.array([bbox for bbox, _, _ in sound], dtype=np.float64).reshape(-1, 4)
        sizes = np.array([(image.width, image.height) for _, image, _ in sound], dtype=np.float64).reshape(-1, 2)
        found = misread(numbers, sizes, SLACK)
        if found is not None:
            problem, number = found
            bbox, image, where = sound[number]
            example = f"{where.removeprefix(f'{self.uri}: ')} has {bbox} in an image of {image.width} x {image.height}"
            self.problems.add(f"{problem} (for example, {example})", self.uri)
            return True
        doubt = unreached(numbers, sizes, len({image.id for _, image, _ in sound}))
        self.warnings += [doubt] if doubt else []
        return False

    def _each(self, kind: str, records: Iterable[Any]) -> Iterable[tuple[str, dict[str, Any]]]:
        """Yield (name in messages, record) for each record; anything else is replaced by an empty record."""
        for position, record in enumerate(records):
            id_ = record.get("id") if isinstance(record, dict) else None
            where = f"{self.uri}: {kind} at position {position}" if id_ is None else f"{self.uri}: {kind} {shortly(id_)}"
            yield where, record if isinstance(record, dict) else {}


def used_categories(annotations: Iterable[Any]) -> set[int]:
    """Return the category ids that annotations use."""
    ids = {_integer(record.get("category_id")) for record in annotations if isinstance(record, dict)}
    return {id_ for id_ in ids if id_ is not None}


def _root_test(records: Iterable[Any], used: Collection[int]) -> Callable[[dict[str, Any]], bool]:
    """Return a test for categories that no annotation uses and that another category names as its supercategory."""
    above = Counter(
        record["supercategory"]
        for record in records
        if isinstance(record, dict) and isinstance(record.get("supercategory"), str)
    )

    def is_root(record: dict[str, Any]) -> bool:
        own = record.get("supercategory") == record["name"]
        return _integer(record.get("id")) not in used and above[record["name"]] > own

    return is_root


def _integer(value: Any) -> int | None:
    """Return a 64-bit integer, which spreadsheets and data frames may have written as 1.0; None for anything else."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63 else None


def _is_text(value: Any) -> TypeGuard[str]:
    """Return whether the value is text that is not empty and can be encoded: half of a surrogate pair cannot."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
